"""Mean inter- and intra-class correlations, computed as suits the device."""
