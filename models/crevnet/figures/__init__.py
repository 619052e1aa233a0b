"""Figures of forecasts, data and runs."""

from crevnet.figures.canvas import run_name as run_name
from crevnet.figures.canvas import save as save
from crevnet.figures.days import day_figure as day_figure
from crevnet.figures.forecasts import forecast_animation as forecast_animation
from crevnet.figures.forecasts import forecast_figure as forecast_figure
from crevnet.figures.lines import error_by_horizon_figure as error_by_horizon_figure
from crevnet.figures.lines import error_by_hour_figure as error_by_hour_figure
from crevnet.figures.lines import learning_curves_figure as learning_curves_figure
from crevnet.figures.log_images import forecast_sheet as forecast_sheet
from crevnet.figures.maps import error_maps_figure as error_maps_figure
from crevnet.figures.maps import rebuilt_figure as rebuilt_figure
