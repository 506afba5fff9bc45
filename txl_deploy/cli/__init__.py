"""The command `txl`: `main` finds the commands, `options` holds what they share, one thin file for each command."""
