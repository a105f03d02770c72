"""What every package needs: errors, settings, files, the terminal."""
