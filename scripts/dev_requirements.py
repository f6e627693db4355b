"""Print the `dev` extra's requirements of pyproject.toml, so that setting up needs no second build of llmq."""

import tomllib
from pathlib import Path

if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    print(" ".join(requirement.replace(" ", "") for requirement in project["optional-dependencies"]["dev"]))
