"""The structures by method, as settings of the recipes, and their names in tables and figures."""

STRUCTURES: dict[str, tuple[str, ...]] = {
    "separation": ("feature_separation",),
    "bridge": ("brownian_bridge",),
    "geometric": ("geometric_consistency",),
}
TITLES = {
    "none": "none",
    "clip": "CLIP",
    "in_modal": "CLIP + within modalities",
    "cyclip": "CyCLIP",
    "separation": "+ separation",
    "bridge": "+ bridge",
    "geometric": "+ geometric consistency",
}
