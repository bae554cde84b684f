"""`mmkt init`: a look at somebody's data, what each column seems to be, and a config that runs."""
