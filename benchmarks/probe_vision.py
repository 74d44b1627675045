"""What the tiny model's vision tower sees: linear probes of colour, shape and cell on its image features.

    python benchmarks/probe_vision.py [model folder ...]      # default: untrained and assets/tiny; 30 s

A probe is a linear classifier from a cell's image token to a property of its shape, trained on two thirds
of 1,200 drawn scenes and tested on the rest. Chance: colour 0.20, shape 0.33, cell 0.11.
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny import COLORS, GRID, SHAPES, build_base_model, cell_of, draw_graphs, render  # noqa: E402


def cell_features(folder, scenes):
    """Image features of the cells that hold a shape: (N, D), standardised."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    images = AutoProcessor.from_pretrained(folder).image_processor(
        images=[render(s) for s in scenes], return_tensors="pt"
    )
    with torch.no_grad():
        features = model.model.visual(images["pixel_values"], grid_thw=images["image_grid_thw"]).pooler_output
    cells = [i * GRID**2 + cell_of(s.box) for i, scene in enumerate(scenes) for s in scene.objects]
    features = features[cells]
    return (features - features.mean(0)) / features.std(0)


def probe(features, labels):
    """Test accuracy of a linear classifier."""
    torch.manual_seed(0)
    n = len(labels) * 2 // 3
    linear = torch.nn.Linear(features.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(linear(features[:n]), labels[:n]).backward()
        optimizer.step()
    return (linear(features[n:]).argmax(1) == labels[n:]).float().mean().item()


def main():
    scenes = list(draw_graphs(1200, seed=0))
    shapes = [s for scene in scenes for s in scene.objects]
    labels = {
        "colour": [list(COLORS).index(s.attributes[0]) for s in shapes],
        "shape": [SHAPES.index(s.kinds[0]) for s in shapes],
        "cell": [cell_of(s.box) for s in shapes],
    }
    with tempfile.TemporaryDirectory() as untrained:
        build_base_model(untrained, seed=0)
        for folder in sys.argv[1:] or [untrained, "assets/tiny"]:
            features = cell_features(folder, scenes)
            accuracies = {name: probe(features, torch.tensor(y)) for name, y in labels.items()}
            print(f"{folder}: " + ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items()))


if __name__ == "__main__":
    main()
