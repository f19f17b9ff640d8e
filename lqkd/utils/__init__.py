"""What every room may use: files and texts that are not to be believed."""
