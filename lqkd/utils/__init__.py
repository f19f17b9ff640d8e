"""What every room may use: files, texts that are not to be believed, progress, random numbers, sums over processes."""
