"""What a user may ask for, and what `config.json` says."""
