"""Parts that the scripts share: networks, methods, schedules and trials. Nothing here imports a script or `pages`."""
