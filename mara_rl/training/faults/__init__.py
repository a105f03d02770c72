"""What a run does when a part of it is late, dies, or is told to stop."""
