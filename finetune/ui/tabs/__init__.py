"""The tabs of `ft ui`: each module has the routes of one tab."""
