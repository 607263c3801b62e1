"""Names of the losses in tables and figures."""

TITLES = {
    "info_nce": "InfoNCE",
    "scaled": "InfoNCE, counts scaled M/m",
    "decoupled": "InfoNCE without the positive (DCL)",
    "global": "global (SogCLR)",
    "gamma_sampled": "gamma, sampled",
    "gamma_expected": "gamma, expected",
    "gamma_sampled_exact": "gamma, sampled, exact S",
    "gamma_expected_exact": "gamma, expected, exact S",
}
