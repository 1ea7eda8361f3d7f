"""Starting a program: command line, config file, settings of the process."""
