"""What the command line can do besides training, a file each."""
