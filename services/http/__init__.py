"""What HTTP APIs share: keys, errors, disconnects."""
