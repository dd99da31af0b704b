"""Where the truth is kept. `protocol` says what the control plane needs; `opening` opens what a setting names."""
