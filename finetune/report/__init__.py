"""What people read and look at: the tables before a run, the page after it."""
