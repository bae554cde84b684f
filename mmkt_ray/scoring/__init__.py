"""How good predictions are: intervals, paired statistics, calibration, objectives, tables of them."""
