"""How things are said: bodies, routes, frames, errors. Pure encoding and decoding over the model's types."""
