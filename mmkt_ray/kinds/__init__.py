"""What differs between kinds of task: one class for each kind. All other code asks the class."""
