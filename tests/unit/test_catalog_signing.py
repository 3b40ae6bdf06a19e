"""Nothing that a signature covers can change unseen, and no secret shows."""

import base64
import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from signing_keys import private_pem, public_pem
from stores import adapter_files, draft
from typer.testing import CliRunner

import raytune_ft.cli.catalog
from raytune_ft.catalog import (
    AdapterRecord,
    Catalog,
    FileEntry,
    Signer,
    Trust,
    fingerprint,
    update_serve_dir,
    verify,
)
from raytune_ft.catalog.record import Signature, parse_record
from raytune_ft.catalog.signing import is_of_small_order, is_valid, parse_public_keys, signed_bytes
from raytune_ft.errors import BadInput, CatalogError
from raytune_ft.storage import open_storage

V1 = "adapters/capital/versions/9999999998.json"
SMALL = "is signed by a key of small order, for which anybody can sign; publish it anew"
ALTERED = "its signature is not one of this record; the record was altered or damaged"

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([byte]) * 32) for byte in (1, 2))
SIGNER = Signer.from_pem(private_pem(KEY), "test")
STRANGER = Signer.from_pem(private_pem(OTHER), "test")
TRUST = Trust(frozenset({SIGNER.public_key}), required=True)


SMALL_ORDER = (
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    # The same points in encodings that are not the shortest, or with a sign that x = 0 has not.
    "0100000000000000000000000000000000000000000000000000000000000080",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
)
"""The eight points of small order, of order 1, 2, 4, 4, 8, 8, 8 and 8; then six other encodings of them."""


def small_order_pem(key: str) -> str:
    der = bytes.fromhex("302a300506032b6570032100" + key)
    return f"-----BEGIN PUBLIC KEY-----\n{base64.b64encode(der).decode()}\n-----END PUBLIC KEY-----\n"


def record(**changes: Any) -> AdapterRecord:
    values: dict[str, Any] = {
        **dict(draft()),
        "version": 3,
        "publish_id": "run-1",
        "created_at": "2026-01-01T00:00:00.000+00:00",
        "files": (FileEntry(name="adapter_model.safetensors", sha256="a" * 64, size_bytes=7),),
    }
    return AdapterRecord(**{**values, **changes})


def read(content: bytes) -> AdapterRecord:
    said = json.loads(content)
    return parse_record(content, said["adapter"], said["version"], "place")


@pytest.fixture
def files(tmp_path: Path) -> Mapping[str, Path]:
    return adapter_files(tmp_path / "files")


@pytest.fixture
def catalog(tmp_path: Path, files: Mapping[str, Path]) -> Catalog:
    """One signed version, which `production` means."""
    catalog = Catalog.at(str(tmp_path / "catalog"))
    catalog.publish(draft(), files, publish_id="run-1", signer=SIGNER)
    catalog.set_alias("capital", "production", 1)
    return catalog


class TestSignature:
    def test_rfc_8032(self) -> None:
        """Section 7.1, test 3."""
        seed = bytes.fromhex("c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7")
        signer = Signer.from_pem(private_pem(Ed25519PrivateKey.from_private_bytes(seed)), "test")
        expected = Signature(
            public_key="fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
            value="6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
            "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
        )
        assert signer.sign(bytes.fromhex("af82")) == expected
        assert is_valid(expected, bytes.fromhex("af82"))
        assert not is_valid(expected, bytes.fromhex("af83"))

    def test_openssl_says_the_same(self, tmp_path: Path) -> None:
        """The record, less its signature, with sorted keys, is what any other program verifies."""
        signed = SIGNER.sign_record(record())
        assert signed.signature is not None
        said = json.loads(signed.to_bytes())
        del said["signature"]
        (tmp_path / "content").write_text(json.dumps(said, sort_keys=True, separators=(",", ":")))
        (tmp_path / "signature").write_bytes(bytes.fromhex(signed.signature.value))
        (tmp_path / "key.pem").write_text(public_pem(KEY))
        command = "openssl pkeyutl -verify -pubin -inkey key.pem -rawin -in content -sigfile signature"
        subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
        der = subprocess.run(
            ["openssl", "pkey", "-pubin", "-in", "key.pem", "-outform", "DER"],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
        assert fingerprint(SIGNER.public_key) == f"sha256:{hashlib.sha256(der.stdout).hexdigest()}"

    def test_each_flipped_byte_shows(self) -> None:
        """Whatever byte of a record changes: it is no record any more, or the signature is refused, or its
        meaning is the same."""
        signed = SIGNER.sign_record(record())
        content = signed.to_bytes()
        for at in range(len(content)):
            for flip in (1, 32):
                altered = content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :]
                try:
                    found = read(altered)
                except (CatalogError, ValueError, KeyError, TypeError):
                    continue
                assert TRUST.problem(found) or found == signed, (at, altered[max(0, at - 40) : at + 40])

    @pytest.mark.parametrize("name", sorted({*AdapterRecord.model_fields} - {"signature", "schema_version"}))
    def test_no_field_can_change_or_go(self, name: str) -> None:
        other = {
            "adapter": "other",
            "kind": "model",
            "base": {"path": "x", "digest": "d" * 64},
            "version": 4,
            "publish_id": "run-2",
            "created_at": "2026-01-01T00:00:00.001+00:00",
            "files": [{"name": "adapter_model.safetensors", "sha256": "b" * 64, "size_bytes": 7}],
            "code_version": "x",
            "parent": "capital@v1",
            "merged_from": ["capital@v1"],
            "origin": {"catalog": "x", "reference": "a@v1", "created_at": "2026-01-01T00:00:00Z"},
            **{field: {} for field in ("method", "job", "data", "library_versions", "machine")},
            **dict.fromkeys(("seed", "steps", "published_step", "tokens", "learned_tokens"), 7),
            "best": {"metric": "exact_match", "value": 0.5, "step": 7},
            "stopped_early": {
                "step": 9,
                "metric": "exact_match",
                "patience": 2,
                "best_value": 0.5,
                "best_step": 7,
            },
            **dict.fromkeys(("loss", "forgetting"), 0.5),
            "scores_before": {"bleu": 0.5},
            "scores_after": {"bleu": 0.5},
            "scored_examples": {"bleu": 7},
            "max_new_tokens": {"test split": 9},
            "notices": ["3 references are cut"],
        }
        said = json.loads(SIGNER.sign_record(record()).to_bytes())
        altered = read(json.dumps({**said, name: other[name]}).encode())
        assert TRUST.problem(altered) == ALTERED
        del said[name]
        shorter = json.dumps(said).encode()
        if AdapterRecord.model_fields[name].is_required():
            with pytest.raises(CatalogError, match=f"{name}: Field required"):
                parse_record(shorter, "capital", 3, "place")
        else:
            assert TRUST.problem(read(shorter)) == ALTERED

    def test_the_order_of_keys_and_spaces_say_nothing(self) -> None:
        signed = SIGNER.sign_record(record())
        said = json.loads(signed.to_bytes())
        turned = json.dumps(dict(reversed(said.items())), indent=7).encode()
        assert TRUST.problem(read(turned)) is None

    def test_a_name_that_stands_twice_is_signed_as_it_is_understood(self) -> None:
        signed = SIGNER.sign_record(record())
        content = signed.to_bytes()
        for altered in (
            content.replace(b'"steps": 10', b'"steps": 99, "steps": 10'),
            content.replace(b'"steps": 10', b'"steps": 10, "steps": 99'),
        ):
            found = read(altered)
            assert (TRUST.problem(found) is None) == (found.steps == 10)

    def test_the_signature_of_another_version(self) -> None:
        first, second = (SIGNER.sign_record(record(version=version)) for version in (1, 2))
        swapped = first.model_copy(update={"signature": second.signature})
        assert TRUST.problem(read(swapped.to_bytes())) == ALTERED

    def test_the_key_of_another(self) -> None:
        signed, foreign = (signer.sign_record(record()) for signer in (SIGNER, STRANGER))
        assert signed.signature is not None
        assert foreign.signature is not None
        assert TRUST.problem(foreign) == (
            f"is signed by {fingerprint(STRANGER.public_key)}, which is none of the 1 trusted keys; "
            "add that key if you trust it"
        )
        claimed = foreign.signature.model_copy(update={"public_key": SIGNER.public_key})
        assert TRUST.problem(foreign.model_copy(update={"signature": claimed})) == ALTERED

    @pytest.mark.parametrize("digits", ["0", "f"])
    def test_bytes_that_are_no_key_or_no_signature(self, digits: str) -> None:
        for change in ({"public_key": digits * 64}, {"value": digits * 128}):
            signature = SIGNER.sign(signed_bytes(record())).model_copy(update=change)
            # As a key, 0 is a point of small order.
            of_nobody = is_of_small_order(signature.public_key)
            assert TRUST.problem(record(signature=signature)) == (SMALL if of_nobody else ALTERED)

    def test_a_signature_replaces_an_earlier_one(self) -> None:
        again = SIGNER.sign_record(STRANGER.sign_record(record()))
        assert again == SIGNER.sign_record(record())


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    data=st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=4),
    loss=st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9),
    steps=st.integers(0, 2**63 - 1),
    path=st.text(),
)
def test_every_record_that_is_signed_is_read_and_valid(
    data: dict[str, Any], loss: float | None, steps: int, path: str
) -> None:
    base = {"path": path, "digest": "d" * 64}
    signed = SIGNER.sign_record(record(data=data, loss=loss, steps=steps, base=base))
    found = read(signed.to_bytes())
    assert found == signed
    assert TRUST.problem(found) is None
    said = json.loads(signed.to_bytes())
    del said["signature"]
    assert signed_bytes(found) == json.dumps(said, sort_keys=True, separators=(",", ":")).encode()


class TestKeys:
    SECRET = private_pem(KEY)

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (None, "is not set; it must hold the PEM text of an ed25519 private key; make one with: "),
            ("", "is empty; it must hold the PEM text of an ed25519 private key; make one with: "),
            (" \n", "is empty; it must hold"),
            ("/home/me/key.pem", "not the PEM text of a private key (nor is a file's name); make one"),
            (SECRET[:60], "not the PEM text of a private key"),
            ("\udcff" + SECRET, "not the PEM text of a private key"),
            (public_pem(KEY), "not the PEM text of a private key"),
            (private_pem(KEY, b"password"), "the key has a password, for which nobody can be asked"),
            (private_pem(ec.generate_private_key(ec.SECP256R1())), "a key of another kind than ed25519"),
            (private_pem(rsa.generate_private_key(65537, 2048)), "a key of another kind than ed25519"),
        ],
    )
    def test_keys_that_cannot_sign(
        self, monkeypatch: pytest.MonkeyPatch, value: str | None, message: str
    ) -> None:
        if value is not None:
            monkeypatch.setenv("RAYTUNE_SIGNING_KEY", value)
        with pytest.raises(BadInput) as caught:
            Signer.from_environment()
        said = str(caught.value)
        assert said.startswith("RAYTUNE_SIGNING_KEY on ")
        assert message in said
        assert not any(line in said for line in (value or "").split() if len(line) > 20)

    def test_the_secret_shows_nowhere(
        self, monkeypatch: pytest.MonkeyPatch, catalog: Catalog, files: Mapping[str, Path]
    ) -> None:
        monkeypatch.setenv("RAYTUNE_SIGNING_KEY", self.SECRET)
        signer = Signer.from_environment()
        published = catalog.publish(draft(), files, publish_id="run-2", signer=signer)
        secret = KEY.private_bytes_raw().hex()
        told = repr(signer) + str(signer) + repr(published)
        told += "".join(
            catalog.storage.read(found.key).decode(errors="replace") for found in catalog.storage.list()
        )
        assert repr(signer) == f"Signer({fingerprint(SIGNER.public_key)})"
        assert secret not in told
        assert self.SECRET.split("\n")[1] not in told

    def test_several_public_keys_with_notes_between(self) -> None:
        text = f"# release\n{public_pem(KEY)}\n# nightly\n{public_pem(OTHER)}"
        assert parse_public_keys(text, "x") == {SIGNER.public_key, STRANGER.public_key}
        assert parse_public_keys(text.replace("\n", "\r\n"), "x") == parse_public_keys(text, "x")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "x: holds no PEM text of a public key; make it with: openssl pkey"),
            ("ssh-ed25519 AAAA", "x: holds no PEM text of a public key"),
            (
                SECRET,
                "x: key 1: is a private key, which signs and must not be given to those who only verify",
            ),
            (public_pem(OTHER) + SECRET, "x: key 2: is a private key"),
            (public_pem(KEY)[:-10], "x: holds no PEM text of a public key"),
            (public_pem(KEY)[:-10] + public_pem(OTHER), "x: one of its PEM blocks does not end"),
            (SECRET.replace("PRIVATE", "PUBLIC"), "x: key 1: is a private key"),
            (SECRET.replace("PRIVATE", "PUBLIC").replace("\n", "\r\n"), "x: key 1: is a private key"),
            (private_pem(KEY, b"password"), "x: key 1: is a private key"),
            (public_pem(KEY).replace("MCow", "AAAA"), "x: key 1: not a public key"),
            (public_pem(ec.generate_private_key(ec.SECP256R1())), "x: key 1: a public key of another kind"),
        ],
    )
    def test_public_keys_that_are_none(self, text: str, message: str) -> None:
        with pytest.raises(BadInput) as caught:
            parse_public_keys(text, "x")
        assert str(caught.value).startswith(message)
        assert self.SECRET.split("\n")[1] not in str(caught.value)

    @pytest.mark.parametrize("key", SMALL_ORDER)
    def test_public_keys_of_small_order(self, key: str) -> None:
        with pytest.raises(
            BadInput, match=r"^x: key 2: a public key of small order, for which anybody can sign"
        ):
            parse_public_keys(public_pem(KEY) + small_order_pem(key), "x")

    def test_a_file_of_keys_that_is_not_there_is_a_mistake_of_the_user(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.pem", tmp_path):
            with pytest.raises(BadInput, match=f"^--trusted-keys {path}: .*; check the name$"):
                Trust.load([path], required=True)

    def test_where_trusted_keys_come_from(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert Trust.load([], required=False) == Trust()
        with pytest.raises(BadInput) as caught:
            Trust.load([], required=True)
        assert str(caught.value) == (
            "a signature is required, and no key is trusted; name a file of public keys with "
            "--trusted-keys, or set RAYTUNE_TRUSTED_KEYS to their PEM text"
        )
        monkeypatch.setenv("RAYTUNE_TRUSTED_KEYS", public_pem(KEY))
        assert Trust.load([], required=True) == TRUST
        (tmp_path / "other.pem").write_text(public_pem(OTHER))
        assert Trust.load([tmp_path / "other.pem"], required=True).keys == {STRANGER.public_key}
        monkeypatch.setenv("RAYTUNE_TRUSTED_KEYS", "")
        with pytest.raises(BadInput, match=r"^RAYTUNE_TRUSTED_KEYS: holds no PEM text"):
            Trust.load([], required=True)


class TestSmallOrder:
    """Eight points of the curve for which anybody can sign: a signature is the identity and zero."""

    @pytest.mark.parametrize("key", SMALL_ORDER)
    def test_it_never_verifies(self, key: str) -> None:
        forged = "01" + "00" * 63
        signature = Signature(public_key=key, value=forged)
        assert is_of_small_order(key)
        # An eighth of all texts fits each of these keys, where nobody looks at the key's order.
        assert not any(is_valid(signature, f"{number}".encode()) for number in range(64))
        claimed = record().model_copy(update={"signature": signature})
        for trust in (Trust(), TRUST, Trust(frozenset({key}), required=True)):
            assert trust.problem(claimed) == (SMALL)

    def test_all_multiples_of_a_point_of_order_8(self) -> None:
        """Computed on the curve -x² + y² = 1 + d·x²·y², from a point of order 8."""
        p = 2**255 - 19
        d = -121665 * pow(121666, -1, p) % p

        def add(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
            (a, b), (e, f) = one, other
            cross = d * a * b * e * f
            return (
                (a * f + b * e) * pow(1 + cross, -1, p) % p,
                (b * f + a * e) * pow(1 - cross, -1, p) % p,
            )

        y = int.from_bytes(bytes.fromhex(SMALL_ORDER[4]), "little")
        square = (y * y - 1) * pow(d * y * y + 1, -1, p) % p
        x = pow(square, (p + 3) // 8, p)
        x = x if x * x % p == square else x * pow(2, (p - 1) // 4, p) % p
        points = [(x, y)]
        while len(points) < 8:
            points.append(add(points[-1], points[0]))
        assert points[-1] == (0, 1)
        encoded = {(y | (x & 1) << 255).to_bytes(32, "little").hex() for x, y in points}
        assert encoded == set(SMALL_ORDER[:8])

    def test_other_keys(self) -> None:
        for number in range(64):
            key = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
            assert not is_of_small_order(key.public_key().public_bytes_raw().hex())


class TestCatalog:
    def test_the_signature_appears_with_the_version(self, catalog: Catalog) -> None:
        found = catalog.resolve("capital")
        assert found.signature is not None
        assert found.signature.public_key == SIGNER.public_key
        assert TRUST.problem(found) is None

    def test_a_publish_that_lost_its_number_signs_the_next(
        self, catalog: Catalog, files: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another publisher takes the number between the look for it and the record."""
        write_once = type(catalog.storage).write_once

        def overtaken(storage: Any, key: str, data: bytes) -> bool:
            if key.endswith("versions/9999999997.json"):
                monkeypatch.undo()
                catalog.publish(draft(), files, publish_id="faster")
            return write_once(storage, key, data)

        monkeypatch.setattr(type(catalog.storage), "write_once", overtaken)
        late = catalog.publish(draft(), files, publish_id="late", signer=SIGNER)
        assert late.version == 3
        assert TRUST.problem(catalog.resolve("capital@v3")) is None

    def test_pull(self, catalog: Catalog, files: Mapping[str, Path], tmp_path: Path) -> None:
        assert catalog.pull("capital", tmp_path / "signed", trust=TRUST).version == 1
        catalog.publish(draft(), files, publish_id="run-2")
        catalog.publish(draft(), files, publish_id="run-3", signer=STRANGER)
        for version in (2, 3):
            with pytest.raises(CatalogError, match=rf"^capital@v{version}: (has no signature|is signed by)"):
                catalog.pull(f"capital@v{version}", tmp_path / "refused", trust=TRUST)
            catalog.pull(f"capital@v{version}", tmp_path / str(version))
        assert not (tmp_path / "refused").exists()

    def test_an_altered_record_is_never_pulled(self, catalog: Catalog, tmp_path: Path) -> None:
        said = json.loads(catalog.storage.read(V1))
        catalog.storage.write(V1, json.dumps({**said, "steps": 11}).encode())
        for trust in (Trust(), TRUST):
            with pytest.raises(CatalogError) as caught:
                catalog.pull("capital", tmp_path / "pulled", trust=trust)
            assert str(caught.value) == f"capital@v1: {ALTERED}"

    def test_altered_content_of_a_signed_version(self, catalog: Catalog, tmp_path: Path) -> None:
        (weights,) = (e for e in catalog.resolve("capital").files if e.name.endswith(".safetensors"))
        catalog.storage.write(f"blobs/{weights.sha256}", b"wEights")
        with pytest.raises(CatalogError, match="is not what was published"):
            catalog.pull("capital", tmp_path / "pulled", trust=TRUST)

    def test_verify(self, catalog: Catalog, files: Mapping[str, Path]) -> None:
        catalog.publish(draft(), files, publish_id="run-2")
        catalog.publish(draft(), files, publish_id="run-3", signer=STRANGER)
        # The content is no safetensors file, which is one problem more.
        foreign = f"{fingerprint(STRANGER.public_key)} signed 1 versions and is none of the trusted keys"
        lenient = verify(catalog, trust=Trust(TRUST.keys))
        assert (len(lenient.problems), lenient.notes) == (1, (foreign,))
        strict = verify(catalog, trust=TRUST)
        assert [problem.partition(":")[0] for problem in strict.problems[1:]] == ["capital@v2", "capital@v3"]
        assert strict.notes == ()
        said = json.loads(catalog.storage.read(V1))
        catalog.storage.write(V1, json.dumps({**said, "seed": 1}).encode())
        assert f"capital@v1: {ALTERED}" in verify(catalog).problems

    def test_serve_dir_leaves_what_stands_there(self, catalog: Catalog, tmp_path: Path) -> None:
        served = open_storage(str(tmp_path / "served"))
        assert update_serve_dir(catalog, "production", served, trust=TRUST).copied == ["capital@v1"]
        other = adapter_files(tmp_path / "other", content=b"unsigned")
        catalog.publish(draft(), other, publish_id="run-2")
        catalog.set_alias("capital", "production", 2)
        found = update_serve_dir(catalog, "production", served, trust=TRUST)
        assert len(found.problems) == 1
        assert found.problems[0].startswith("capital@v2: has no signature")
        assert served.read("capital/adapter_model.safetensors") == b"weights"
        assert update_serve_dir(catalog, "production", served).copied == ["capital@v2"]


class TestCommands:
    @pytest.fixture
    def keys(self, tmp_path: Path) -> str:
        (tmp_path / "keys.pem").write_text(public_pem(KEY))
        return str(tmp_path / "keys.pem")

    def run(self, *arguments: str) -> Any:
        return CliRunner().invoke(raytune_ft.cli.catalog.app, list(arguments), env={"COLUMNS": "300"})

    def test_show(self, catalog: Catalog) -> None:
        at = ("--catalog", catalog.uri)
        assert f"valid, by {fingerprint(SIGNER.public_key)}" in self.run("show", "capital", *at).stdout
        told = json.loads(self.run("show", "capital", *at, "--json").stdout)
        assert (told["signer"], told["signature_problem"]) == (fingerprint(SIGNER.public_key), None)
        said = json.loads(catalog.storage.read(V1))
        catalog.storage.write(V1, json.dumps({**said, "seed": 1}).encode())
        assert ALTERED in self.run("show", "capital", *at).stdout
        assert json.loads(self.run("show", "capital", *at, "--json").stdout)["signature_problem"] == ALTERED

    def test_pull_and_serve_dir(self, catalog: Catalog, keys: str, tmp_path: Path) -> None:
        strict = ("--catalog", catalog.uri, "--require-signature", "--trusted-keys", keys)
        assert self.run("pull", "capital", "--to", str(tmp_path / "a"), *strict).exit_code == 0
        serve = ("serve-dir", "--alias", "production", "--to", str(tmp_path / "served"))
        assert self.run(*serve, *strict).exit_code == 0
        (tmp_path / "keys.pem").write_text(public_pem(OTHER))
        refused = self.run("pull", "capital", "--to", str(tmp_path / "b"), *strict)
        assert isinstance(refused.exception, CatalogError)
        assert self.run(*serve, *strict).exit_code == 2

    def test_verify(self, catalog: Catalog, keys: str) -> None:
        found = self.run("verify", "--catalog", catalog.uri, "--trusted-keys", keys, "--json")
        assert json.loads(found.stdout)["notes"] == []
        found = self.run("verify", "--catalog", catalog.uri, "--json")
        assert "is none of the trusted keys" in json.loads(found.stdout)["notes"][0]
        assert isinstance(
            self.run("verify", "--catalog", catalog.uri, "--require-signature").exception, BadInput
        )

    def test_keys_that_would_check_nothing(self, catalog: Catalog, keys: str) -> None:
        result = self.run("pull", "capital", "--catalog", catalog.uri, "--trusted-keys", keys)
        assert str(result.exception) == (
            "--trusted-keys: without --require-signature nothing is held against them; give both"
        )
