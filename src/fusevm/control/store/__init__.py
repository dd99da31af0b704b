"""Where the truth is kept. `protocol` says what the control plane needs; `sqlite` keeps it in one file or in memory."""
