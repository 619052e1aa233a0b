"""Output of the scripts: rows in files, tables, pages of results and figures. Nothing here imports a script."""
