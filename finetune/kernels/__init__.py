"""Faster versions of other libraries' modules. Each patch can be switched off."""
