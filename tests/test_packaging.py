"""What stands in packaging/, read by the programs that it is for, where they are here."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

PACKAGING = Path(__file__).parent.parent / "packaging"


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not here")
    return path


@pytest.mark.slow
def test_nginx_takes_its_file(tmp_path: Path) -> None:
    nginx, openssl = program("nginx"), program("openssl")
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=models.example.org",
         "-keyout", tmp_path / "privkey.pem", "-out", tmp_path / "fullchain.pem"], check=True, capture_output=True,
    )  # fmt: skip
    text = (PACKAGING / "nginx.conf").read_text(encoding="utf-8")
    site = tmp_path / "site.conf"
    site.write_text(re.sub(r"/etc/letsencrypt/live/[^/]+", str(tmp_path), text), encoding="utf-8")
    main = tmp_path / "nginx.conf"
    main.write_text(
        f"pid {tmp_path}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{ include {site}; }}\n", encoding="utf-8"
    )
    done = subprocess.run([nginx, "-t", "-c", main, "-p", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "warn" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["plait.service", "plait@.service"])
def test_systemd_takes_the_units(unit: str, tmp_path: Path) -> None:
    verify = program("systemd-analyze")
    text = (PACKAGING / unit).read_text(encoding="utf-8").replace("/opt/plait/bin/plait", "/bin/true")
    name = unit.replace("@", "@8000")
    (tmp_path / name).write_text(text, encoding="utf-8")
    done = subprocess.run([verify, "verify", "--man=no", tmp_path / name], capture_output=True, text=True, check=False)
    faults = [line for line in done.stderr.splitlines() if name in line]
    assert not faults, faults


@pytest.mark.slow
def test_hadolint_takes_the_dockerfile() -> None:
    done = subprocess.run([program("hadolint"), PACKAGING / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_compose_names_what_the_image_has() -> None:
    service = yaml.safe_load((PACKAGING / "compose.yaml").read_text(encoding="utf-8"))["services"]["plait"]
    dockerfile = (PACKAGING / "Dockerfile").read_text(encoding="utf-8")
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    for volume in service["volumes"]:
        place = volume.replace("${", "").split(":")
        assert any(part in dockerfile for part in place if part.startswith("/")), volume
