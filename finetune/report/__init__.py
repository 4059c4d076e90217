"""Tables, image grids, charts and HTML pages about data and runs."""
