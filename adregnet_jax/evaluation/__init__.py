"""What a trained network is worth: metrics per case, tables and figures."""
