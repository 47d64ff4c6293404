"""The compact SAM, trained from scratch on generated shapes."""
