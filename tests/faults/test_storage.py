"""An object store that fails on purpose: a part of what `python -m tests.faults.s3_faults` tries, and each guard."""

import uuid

import pytest

from infra import s3, storage
from infra.errors import InputError, StorageError
from tests.faults import s3_faults
from tests.helpers_s3_faults import faulty

pytestmark = pytest.mark.s3


@pytest.fixture
def place(moto_s3):
    return storage.join(moto_s3, uuid.uuid4().hex)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(s3, "FIRST_DELAY_S", 0.001)


def test_operations_under_faults_lose_and_invent_nothing(moto_endpoint, place, tmp_path):
    player = s3_faults.Player(place, tmp_path, seed=5)
    with faulty(moto_endpoint, rate=0.2, seed=5) as proxy:
        ledger = player.play(150)
        assert s3_faults.race(place, 10) == 0
    assert (ledger.wrong, ledger.failed) == ([], [])
    storage.remove(storage.join(place, "race"), recursive=True)
    assert player.left_over() == ([], [])
    assert sum(proxy.faults.values()) > 20


@pytest.mark.parametrize("fault", ["lost", "reset", "late", "undone", "conflict", "error"])
def test_create_only_tells_the_truth_when_its_answer_is_broken(moto_endpoint, place, monkeypatch, fault, quick):
    with faulty(moto_endpoint, rate=0.0, seed=0) as proxy:
        script = iter([fault])
        monkeypatch.setattr(proxy, "draw", lambda *, conditional: next(script, ""))
        assert storage.create_only(f"{place}/new", b"same")
        assert not storage.create_only(f"{place}/new", b"same")
        script = iter([fault])
        assert not storage.create_only(f"{place}/new", b"other")
        assert storage.read_bytes(f"{place}/new") == b"same"


def test_a_failed_listing_is_not_an_empty_folder(moto_endpoint, place, monkeypatch, quick):
    storage.write_bytes(f"{place}/a/x", b"1")
    with faulty(moto_endpoint, rate=0.0, seed=0) as proxy:
        script = iter(["error", "slow down", "cut", "lost"])
        monkeypatch.setattr(proxy, "draw", lambda *, conditional: next(script, ""))
        assert storage.list_names(f"{place}/a") == ["x"]
        monkeypatch.setattr(proxy, "draw", lambda *, conditional: "error")
        with pytest.raises(StorageError, match="after 8 attempts"):
            storage.list_names(f"{place}/a")
        with pytest.raises(StorageError, match="after 8 attempts"):
            storage.exists(f"{place}/a")


@pytest.mark.parametrize("fault", ["error", "slow down", "undone", "cut"])
def test_attempts_are_bounded(moto_endpoint, place, monkeypatch, fault, quick):
    storage.write_bytes(f"{place}/x", b"12")
    with faulty(moto_endpoint, rate=0.0, seed=0) as proxy:
        asked = []
        monkeypatch.setattr(proxy, "draw", lambda *, conditional: asked.append(1) or fault)
        with pytest.raises(StorageError, match="after 8 attempts"):
            storage.read_bytes(f"{place}/x")
        # aiohttp asks a second time where a kept connection turns out closed.
        assert s3.MAX_ATTEMPTS <= len(asked) <= 2 * s3.MAX_ATTEMPTS


def test_refusals_are_not_repeated(moto_endpoint, place, tmp_path):
    storage.write_bytes(f"{place}/x", b"12")
    with faulty(moto_endpoint, rate=0.0, seed=0) as proxy:
        with pytest.raises(StorageError, match="not repeated"):
            storage.read_range(f"{place}/x", 5, 2)
        assert proxy.requests == 1
        with pytest.raises(InputError, match="does not exist"):
            storage.read_bytes(f"{place}/nothing")
        with pytest.raises(InputError, match="does not exist"):
            storage.get_file(f"{place}/nothing", tmp_path / "x")
        with pytest.raises(InputError, match="does not exist"):
            storage.size_bytes(f"{place}/nothing")
        assert proxy.requests == 4
    assert list(tmp_path.iterdir()) == []


def test_listings_of_many_pages_and_removal_of_many_objects(place, monkeypatch):
    for number in range(7):
        storage.write_bytes(f"{place}/many/{number % 2}/{number}", b"")
    storage.write_bytes(f"{place}/many-more", b"")
    monkeypatch.setattr(s3, "DELETED_AT_ONCE", 3)
    fs, _ = s3.open_s3(place)
    call = fs.call_s3

    def small_pages(method, **options):
        return call(method, **(options | {"MaxKeys": 2} if method == "list_objects_v2" else options))

    monkeypatch.setattr(fs, "call_s3", small_pages)
    assert storage.list_names(f"{place}/many", recursive=True) == sorted(f"{n % 2}/{n}" for n in range(7))
    assert storage.list_names(f"{place}/many") == []
    storage.remove(f"{place}/many", recursive=True)
    assert storage.list_names(place, recursive=True) == ["many-more"]
    assert not storage.exists(f"{place}/many") and storage.exists(f"{place}/many-more") and storage.exists(place)


def test_ingest_on_a_faulty_store_ends_in_the_same_manifest(moto_endpoint, place, tmp_path):
    s3_faults.make_corpus(tmp_path / "corpus")
    storage.put_folder(tmp_path / "corpus", f"{place}/corpus")
    undisturbed = s3_faults.ingest(place, "undisturbed")
    with faulty(moto_endpoint, rate=0.15, seed=1) as proxy:
        assert s3_faults.ingest(place, "disturbed") == undisturbed
    assert sum(proxy.faults.values()) > 5
