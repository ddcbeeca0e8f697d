"""Tables compared: pairing, intervals, costs, slopes. Without torch."""
