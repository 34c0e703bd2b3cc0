"""The description parser: what it makes of a description, and where it says a wrong one is wrong."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from attrs import asdict, evolve
from hypothesis import example, given
from hypothesis import strategies as st

from qsnap.config import files_of, missing_file_error, parse_description
from qsnap.config.key_lines import KeyLines, dotted, parse_dotted
from qsnap.errors import ConfigError
from qsnap.host.descriptions import load_description
from qsnap.model import VM, VNE, Accelerator, Backing, Disk, Host, Network, Nic
from tests.samples import vnes

LAB = """\
name = "lab"

[defaults]
memory = "512M"
kernel = "boot/vmlinuz"
network = "lan"

[network.lan]
[network.wan]
mtu = 9000

[vm.alice]
memory = "1G"
backing = "hugetlb"
disks = [
  "alice.qcow2",            # "[not a table]"
  { file = "/images/data.img", format = "raw", interface = "ide-hd" },
]

[vm.bob]
qemu = "./qemu/qemu-system-x86_64"
accelerator = "tcg"
vcpus = 2
nics = ["lan", { network = "wan", mac = "52:54:00:AB:cd:ef", model = "e1000" }]
extra = ["-device", "virtio-rng-pci"]
numa = ["128M", "384M"]
dimms = ["1G"]
"""


def parse(text: str, base_dir: str = "") -> VNE:
    return parse_description(text, file="lab.toml", base_dir=base_dir)


def fault(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert caught.value.file == "lab.toml"
    return caught.value


def one_vm(*lines: str) -> str:
    """A description whose lines start at line 4."""
    return "\n".join(['name = "lab"', "[network.lan]", "[vm.alice]", *lines])


def test_a_whole_description() -> None:
    vne = parse(LAB, "/srv")
    alice, bob = vne.vms
    assert (vne.name, vne.networks) == ("lab", (Network("lan"), Network("wan", 9000)))
    assert alice == VM(
        name="alice",
        memory_bytes=1 << 30,
        backing=Backing.HUGETLB,
        kernel="/srv/boot/vmlinuz",
        disks=(Disk("/srv/alice.qcow2"), Disk("/images/data.img", "raw", "ide-hd")),
        nics=(Nic("lan", alice.nics[0].mac),),
    )
    assert (bob.memory_bytes, bob.vcpus, bob.accelerator) == (512 << 20, 2, Accelerator.TCG)
    assert (bob.numa, bob.dimms, bob.ram_bytes) == ((128 << 20, 384 << 20), (1 << 30,), 1536 << 20)
    assert bob.qemu == "/srv/qemu/qemu-system-x86_64"
    assert bob.nics[1] == Nic("wan", "52:54:00:ab:cd:ef", "e1000")
    assert bob.extra == ("-device", "virtio-rng-pci")


@pytest.mark.parametrize(
    ("size", "expected_bytes"),
    [('"2M"', 2 << 20), ('"4096k"', 4 << 20), ('"1T"', 1 << 40), ("2097152", 2 << 20), ('"4194304"', 4 << 20)],
)
def test_sizes(size: str, expected_bytes: int) -> None:
    assert parse(one_vm(f"memory = {size}", 'kernel = "k"')).vms[0].memory_bytes == expected_bytes


@pytest.mark.parametrize(("machine", "bus"), [("q35", "pci"), ("virt", "pci"), ("microvm", "device")])
def test_virtio_is_on_the_bus_that_the_machine_has(machine: str, bus: str) -> None:
    lines = ('memory = "2M"', 'disks = ["a", { file = "b" }]', 'nics = ["lan", { network = "lan" }]')
    vm = parse(one_vm(*lines, f'machine = "{machine}"')).vms[0]
    assert {disk.interface for disk in vm.disks} == {f"virtio-blk-{bus}"}
    assert {nic.model for nic in vm.nics} == {f"virtio-net-{bus}"}
    given = parse(one_vm(*lines[:1], 'disks = [{ file = "a", interface = "ide-hd" }]', f'machine = "{machine}"'))
    assert given.vms[0].disks[0].interface == "ide-hd"


def test_an_empty_value_overrides_a_default() -> None:
    vm = parse(LAB + 'kernel = ""\ndisks = ["b.qcow2"]\n').vms[1]
    assert (vm.kernel, vm.disks) == ("", (Disk("b.qcow2"),))


def test_a_program_without_a_slash_is_left_to_the_path() -> None:
    assert parse(one_vm('memory="2M"', 'kernel="k"', 'qemu="qemu-7"'), "/srv").vms[0].qemu == "qemu-7"


class TestMacs:
    def test_made_ones_are_stable_local_and_unlike(self) -> None:
        text = one_vm('memory="2M"', 'kernel="k"', 'nics=["lan", "lan"]', "[vm.bob]", 'memory="2M"', 'kernel="k"')
        text += '\nnics=["lan", "lan"]'
        macs = [nic.mac for vm in parse(text).vms for nic in vm.nics]
        assert macs == [nic.mac for vm in parse(text).vms for nic in vm.nics]
        assert len(set(macs)) == 4
        assert all(mac.startswith("52:54:00:") for mac in macs)

    def test_made_ones_differ_between_vnes(self) -> None:
        text = one_vm('memory="2M"', 'kernel="k"', 'nics=["lan"]')
        assert parse(text).vms[0].nics != parse(text.replace('"lab"', '"lab2"')).vms[0].nics

    def test_a_made_one_gives_way_to_one_asked_for(self) -> None:
        text = one_vm('memory="2M"', 'kernel="k"', 'nics=["lan"]')
        mac = parse(text).vms[0].nics[0].mac
        both = parse(text.replace('["lan"]', f'["lan", {{ network = "lan", mac = "{mac}" }}]')).vms[0].nics
        assert both[1].mac == mac
        assert both[0].mac != mac

    def test_both_places_of_a_double_one_are_named(self) -> None:
        nic = 'nics = [{ network = "lan", mac = "52:54:00:00:00:01" }]'
        error = fault(one_vm('memory="2M"', 'kernel="k"', nic, "[vm.bob]", 'memory="2M"', 'kernel="k"', nic))
        assert (error.line, error.key) == (10, "vm.bob.nics[0].mac")
        assert "VM bob and VM alice (line 6)" in error.message

    def test_one_in_the_defaults_serves_one_vm_only(self) -> None:
        nic = 'nics = [{ network = "lan", mac = "52:54:00:00:00:01" }]'
        text = one_vm('kernel="k"', "[vm.bob]", 'kernel="k"', "[defaults]", 'memory="2M"', nic)
        assert (fault(text).line, fault(text).key) == (9, "defaults.nics[0].mac")


FAULTS = [
    ('memory = "1G', 4, "", "not valid TOML"),
    ('memory = "1G"\nmemory = "2G"', 5, "", "not valid TOML"),
    ('kernel = "k"', 3, "vm.alice.memory", "is required"),
    ('memory = "1G"', 3, "vm.alice", "nothing to boot from"),
    ('memry = "1G"', 4, "vm.alice.memry", "Did you mean `memory`?"),
    ('"a b" = 1', 4, 'vm.alice."a b"', "unknown key"),
    ("memory = true", 4, "vm.alice.memory", "a whole number, not a boolean"),
    ('memory = "1 GB"', 4, "vm.alice.memory", "not a size"),
    ('memory = "-1G"', 4, "vm.alice.memory", "not a size"),
    ("memory = -1", 4, "vm.alice.memory", "not between"),
    ("memory = 512", 4, "vm.alice.memory", 'Did you mean "512M"?'),
    ('memory = "17T"', 4, "vm.alice.memory", "16 TiB"),
    ('memory = "5M"', 4, "vm.alice.memory", 'Take "4M" or "6M"'),
    ('backing = "hugetbl"', 4, "vm.alice.backing", "Did you mean `hugetlb`? Valid: auto, anonymous"),
    ('backing = "file"', 4, "vm.alice.backing", "unknown value 'file'"),
    ('numa = ["1G", "1G"]\nmemory = "1G"\nkernel = "k"', 4, "vm.alice.numa", "must be the sum of all nodes"),
    ('numa = ["1G", "3M"]', 4, "vm.alice.numa[1]", 'Take "2M" or "4M"'),
    ('dimms = "1G"', 4, "vm.alice.dimms", "must be an array"),
    ('accelerator = "KVM"', 4, "vm.alice.accelerator", "Valid: auto, kvm, tcg"),
    ("vcpus = 0", 4, "vm.alice.vcpus", "not between 1 and 255"),
    ("vcpus = 1.0", 4, "vm.alice.vcpus", "a whole number, not a float"),
    ('vcpus = "1"', 4, "vm.alice.vcpus", "a whole number, not a string"),
    ("vcpus = 1979-05-27", 4, "vm.alice.vcpus", "not a date"),
    ('machine = "pc,usb=on"', 4, "vm.alice.machine", "properties cannot be added"),
    ('cpu = "a\\u0000b"', 4, "vm.alice.cpu", "NUL"),
    ('qemu = ""', 4, "vm.alice.qemu", "not a file"),
    ('memory = "1G"\ndisks = ["d"]\nappend = "x"', 6, "vm.alice.append", "goes with `kernel`"),
    ('memory = "1G"\ndisks = ["d"]\ninitrd = "x"', 6, "vm.alice.initrd", "goes with `kernel`"),
    ('disks = "d"', 4, "vm.alice.disks", "must be an array, not a string"),
    ('disks = [\n  "a",\n  7,\n]', 6, "vm.alice.disks[1]", "must be a table, not a whole number"),
    ('disks = [\n  "a",\n  { format = "raw" },\n]', 6, "vm.alice.disks[1].file", "is required"),
    ('disks = [""]', 4, "vm.alice.disks[0]", "not a file"),
    ('disks = [{ file = "a", interface = "nvme," }]', 4, "vm.alice.disks[0].interface", "not a QEMU device"),
    ('disks = [{ file = "a", interface = "nvme,drive=x" }]', 4, "vm.alice.disks[0].interface", "not a QEMU device"),
    ('nics = [{ network = "lan", model = "e1000,id=a" }]', 4, "vm.alice.nics[0].model", "not a QEMU device"),
    ('disks = [{ file = "a", format = "qcow" }]', 4, "vm.alice.disks[0].format", "Did you mean `qcow2`?"),
    ('disks = [{ file = "a", formt = "qcow2" }]', 4, "vm.alice.disks[0].formt", "Did you mean `format`?"),
    ('[[vm.alice.disks]]\nfile = "a"\n[[vm.alice.disks]]\nfile = 1', 7, "vm.alice.disks[1].file", "a string"),
    ('network = "lam"', 4, "vm.alice.network", "Did you mean `lan`? Valid: lan"),
    ('nics = [\n "lan",\n "wan"]', 6, "vm.alice.nics[1]", "unknown network 'wan'"),
    ('nics = [{ model = "e1000" }]', 4, "vm.alice.nics[0].network", "is required"),
    ('nics = ["lan"]\nnetwork = "lan"', 5, "vm.alice.network", "stands for one NIC"),
    ('nics = [{ network = "lan", mac = "53:54:00:00:00:01" }]', 4, "vm.alice.nics[0].mac", "multicast"),
    ('nics = [{ network = "lan", mac = "52-54-00-00-00-01" }]', 4, "vm.alice.nics[0].mac", "not a MAC"),
    ('nics = [{ network = "lan", mac = "00:00:00:00:00:00" }]', 4, "vm.alice.nics[0].mac", "no address"),
    ("extra = [1]", 4, "vm.alice.extra[0]", "must be a string"),
    ('extra = "-usb"', 4, "vm.alice.extra", "must be an array"),
    ('extra = ["a.img"]', 4, "vm.alice.extra[0]", "belongs to no option"),
    ('extra = ["-device", "a", "b"]', 4, "vm.alice.extra[2]", "belongs to no option"),
    ("[vm.bob]\nvcpus = 0", 5, "vm.bob.vcpus", "not between"),
    ("[vm]\nbob.vcpus = 0", 5, "vm.bob.vcpus", "not between"),
    ("[vm.Bob]", 4, "vm.Bob", "not a name"),
    ('[vm."-b"]', 4, "vm.-b", "not a name"),
    ("[network.wan]\nmtu = 10", 5, "network.wan.mtu", "not between 68 and 65521"),
    ("[network.wan]\nvni = 16777216", 5, "network.wan.vni", "not between 2 and 16777214"),
    ("[network.wan]\nvni = 4001", 5, "network.wan.vni", "odd"),
    ("[network.wan]\nvlan = 10", 5, "network.wan.vlan", "Valid: mtu"),
    ("[defaults]\nvcpu = 10", 5, "defaults.vcpu", "Did you mean `vcpus`?"),
    ("[defaults]\nname = 'x'", 5, "defaults.name", "unknown key"),
    ("[vms.bob]", 4, "vms", "Did you mean `vm`?"),
]


@pytest.mark.parametrize(("lines", "line", "key", "words"), FAULTS)
def test_faults_are_named_with_line_and_key(lines: str, line: int, key: str, words: str) -> None:
    error = fault(one_vm(lines))
    assert (error.line, error.key) == (line, key)
    assert words in str(error)
    assert len(str(error)) < 600


@pytest.mark.parametrize(
    ("text", "line", "key", "words"),
    [
        ("", 0, "name", 'For example: name = "lab"'),
        ("name = 1", 1, "name", "must be a string"),
        ('name = "Lab"', 1, "name", "not a name"),
        (f'name = "{"a" * 33}"', 1, "name", "not a name"),
        ('name = "lab"', 0, "vm", "at least one VM"),
        ('name = "lab"\n[vm]', 2, "vm", "at least one VM"),
        ('name = "lab"\nvm = 3', 2, "vm", "must be a table"),
        ('name = "lab"\nvm = { a = 3 }', 2, "vm.a", "must be a table"),
        ('name = "lab"\nnetwork = "lan"', 2, "network", "must be a table"),
        ('name = "lab"\r\n\r\nvm = 3\r\n', 3, "vm", "must be a table"),
        ('name = """', 1, "", "not valid TOML"),
    ],
)
def test_faults_of_the_whole(text: str, line: int, key: str, words: str) -> None:
    error = fault(text)
    assert (error.line, error.key) == (line, key)
    assert words in str(error)


def test_excesses_are_refused_in_few_words() -> None:
    """Python itself refuses to parse, print or nest such things."""
    many = "9" * 5000
    assert "not a size" in str(fault(one_vm(f'memory = "{many}"')))
    assert "not valid TOML" in str(fault(one_vm(f"memory = {many}")))
    assert "a number of 20000 bits" in str(fault(one_vm(f"vcpus = 0x{'f' * 5000}")))
    assert "nested too deeply" in str(fault(one_vm(f"vcpus = {'[' * 5000}")))
    assert "must be a whole number" in str(fault(one_vm(f"vcpus = {'[' * 200}{']' * 200}")))


class TestExtra:
    @pytest.mark.parametrize(
        ("option", "key"),
        [
            ("-m", "`memory`"),
            ("--machine", "`machine`"),
            ("-enable-kvm", "`accelerator`"),
            ("-smp", "`vcpus`"),
            ("-cpu", "`cpu`"),
            ("-drive", "`disks`"),
            ("-nic", "`nics`"),
            ("-qmp", "sets this itself"),
            ("-nodefaults", "sets this itself"),
            ("-S", "how the VM starts"),
            ("-incoming", "how the VM starts"),
        ],
    )
    def test_options_of_qsnap_are_refused(self, option: str, key: str) -> None:
        error = fault(one_vm(f'extra = ["-usb", "{option}", "x"]'))
        assert error.key == "vm.alice.extra[1]"
        assert key in error.advice

    @pytest.mark.parametrize("backend", ["memory-backend-ram,id=x", '{\\"qom-type\\":\\"memory-backend-memfd\\"}'])
    def test_memory_backends_are_refused(self, backend: str) -> None:
        assert "`backing`" in fault(one_vm(f'extra = ["-object", "{backend}"]')).advice

    @pytest.mark.parametrize("netdev", ["tap,id=n", "socket,id=n", '{\\"type\\":\\"user\\"}', "users"])
    def test_other_ways_between_vms_are_refused(self, netdev: str) -> None:
        assert "`nics`" in fault(one_vm(f'extra = ["-netdev", "{netdev}"]')).advice

    @pytest.mark.parametrize(
        "extra",
        [
            ("-netdev", "user,id=n0,hostfwd=tcp::2222-:22", "-device", "e1000,netdev=n0"),
            ("-chardev", "socket,id=c,path=/tmp/c", "-usb", "-object", "rng-random,id=r"),
            ("--netdev", "type=user,id=n"),
        ],
    )
    def test_others_are_allowed(self, extra: tuple[str, ...]) -> None:
        text = one_vm('memory="2M"', 'kernel="k"', f"extra = {json.dumps(extra)}")
        assert parse(text).vms[0].extra == extra


class TestFiles:
    def test_all_that_must_exist(self) -> None:
        assert files_of(parse(LAB, "/srv")) == (
            ("vm.alice.kernel", "/srv/boot/vmlinuz"),
            ("vm.alice.disks[0].file", "/srv/alice.qcow2"),
            ("vm.alice.disks[1].file", "/images/data.img"),
            ("vm.bob.qemu", "/srv/qemu/qemu-system-x86_64"),
            ("vm.bob.kernel", "/srv/boot/vmlinuz"),
        )

    @pytest.mark.parametrize(
        ("key", "line", "reported"),
        [
            ("vm.alice.disks[0].file", 16, "vm.alice.disks[0].file"),
            ("vm.alice.disks[1].file", 17, "vm.alice.disks[1].file"),
            ("vm.bob.qemu", 21, "vm.bob.qemu"),
            ("vm.bob.kernel", 5, "defaults.kernel"),
        ],
    )
    def test_a_missing_one_is_reported_where_it_was_given(self, key: str, line: int, reported: str) -> None:
        error = missing_file_error(LAB, "lab.toml", key, "/x")
        assert (error.file, error.line, error.key) == ("lab.toml", line, reported)
        assert "no such file: /x" in str(error)


class TestKeyLines:
    def test_strings_and_comments_are_not_taken_for_keys(self) -> None:
        text = 'a = """\n[b]\nc = \\"" """"\n# d = 1\ne = \'\'\'\n[f]\'\'\'\n"g h".i = \'#[j]\'\n'
        assert tomllib.loads(text).keys() == {"a", "e", "g h"}
        assert KeyLines(text).found == {("a",): 1, ("e",): 5, ("g h",): 7, ("g h", "i"): 7}

    def test_tables_inside_arrays_of_tables(self) -> None:
        text = "[[a]]\n[a.b]\nc = 1\n[[a]]\n[[a.d]]\n[[a.d]]\ne = [[1,\n2], {f = 3}]"
        found = KeyLines(text).found
        assert found["a", 0, "b", "c"] == 3
        assert found["a", 1, "d", 1, "e", 0, 1] == 8
        assert found["a", 1, "d", 1, "e", 1, "f"] == 8

    def test_dotted_keys_are_read_back(self) -> None:
        assert dotted(("vm", "web", "nics", 0, "mac")) == "vm.web.nics[0].mac"
        assert parse_dotted("vm.web.nics[0].mac") == ("vm", "web", "nics", 0, "mac")


# --- properties ---------------------------------------------------------------------------------------------

KEYS = st.sampled_from(["name", "vm", "network", "defaults", "memory", "nics", "disks", "extra", "mac", "a"])
VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8) | KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)
FRAGMENTS = st.sampled_from([*LAB.split("\n"), *"[]{}=,.\"'#\n", '"""', "'''", "[[vm.bob.nics]]", "\0", "\\"])


def inline(value: object) -> str:
    """`value` as TOML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{inline(key)} = {inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(inline, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def document(content: dict[str, object]) -> str:
    return "\n".join(f"{inline(key)} = {inline(value)}" for key, value in content.items())


def assert_parses_or_refuses(text: str) -> None:
    line = 0
    try:
        parse(text)
    except ConfigError as error:
        line = error.line
    assert 0 <= line <= text.count("\n") + 1


@given(st.text() | st.lists(FRAGMENTS).map("\n".join) | st.lists(FRAGMENTS).map("".join))
def test_no_text_raises_anything_else(text: str) -> None:
    assert_parses_or_refuses(text)


@given(st.dictionaries(KEYS, VALUES))
@example({"name": "lab", "vm": {"a": {"disks": [[[[[[]]]]]]}}})
def test_no_toml_raises_anything_else(content: dict[str, object]) -> None:
    assert_parses_or_refuses(document(content))


@given(st.dictionaries(KEYS, VALUES), st.integers(0, 5))
def test_every_key_of_a_toml_text_is_located(content: dict[str, object], blank: int) -> None:
    found = KeyLines("\n" * blank + document(content)).found
    for number, (key, value) in enumerate(content.items(), start=1 + blank):
        assert found[(key,)] == number
        for inner in value if isinstance(value, dict) else ():
            assert found[key, inner] == number
        for index in range(len(value)) if isinstance(value, list) else ():
            assert found[key, index] == number


def render(vne: VNE) -> str:
    """The description of `vne`, every key of VMs that qsnap starts given."""
    vms = {}
    for vm in vne.vms:
        fields = asdict(vm, value_serializer=lambda _, __, value: getattr(value, "value", value))
        del fields["name"], fields["qmp"]
        for nic in fields["nics"]:
            del nic["tap"]
        vms[vm.name] = {"memory": fields.pop("memory_bytes"), **fields}
    networks = {network.name: {"mtu": network.mtu} for network in vne.networks}
    return document({"name": vne.name, "network": networks, "vm": vms})


@given(vnes())
def test_a_rendered_vne_is_read_back(vne: VNE) -> None:
    assert parse(render(vne)) == vne


ATTACHED = """\
name = "lab"
[defaults]
memory = "512M"
kernel = "k"
[network.lan]
[vm.alice]
qmp = "a.qmp"
nics = [{ network = "lan", tap = "vnet0" }, "lan"]
[vm.bob]
qmp = "/run/b.qmp"
network = "lan"
qemu = "q/qemu"
"""


def test_vms_that_run_already() -> None:
    vne = parse(ATTACHED, "/srv")
    assert vne.attached
    assert vne.vms == (
        VM("alice", 0, qemu="", nics=(Nic("lan", "", tap="vnet0"), Nic("lan", "")), qmp="/srv/a.qmp"),
        VM("bob", 0, qemu="/srv/q/qemu", nics=(Nic("lan", ""),), qmp="/run/b.qmp"),
    )
    own = vne.as_own()
    assert not own.attached
    assert own.vms[0].nics[0] == Nic("lan", "")


@pytest.mark.parametrize(
    ("line", "key", "message"),
    [
        ('[vm.carol]\nmemory = "1G"', "vm.carol.qmp", "is missing, and VM alice has it"),
        ('memory = "1G"', "vm.bob.memory", "is learned from the running VM"),
        ('[vm.carol]\nqmp = ""', "vm.carol.qmp", "is not a file"),
    ],
)
def test_faults_of_vms_that_run_already(line: str, key: str, message: str) -> None:
    error = fault(f"{ATTACHED}{line}\n")
    assert error.key == key
    assert message in error.message


def test_taps_are_named_by_qsnap_otherwise() -> None:
    error = fault(one_vm('memory = "1G"', 'kernel = "k"', 'nics = [{ network = "lan", tap = "vnet0" }]'))
    assert (error.line, error.key) == (6, "vm.alice.nics[0].tap")


SPREAD = """\
name = "lab"
[hosts]
alpha = "10.0.0.1"
beta = { address = "beta.example:7000", tunnel = "10.0.0.2" }
gamma = { address = "[fd00::3]:7001", tunnel = "10.0.0.3" }
[defaults]
memory = "512M"
kernel = "k"
host = "alpha"
[vm.alice]
[vm.bob]
host = "beta"
"""


def test_vms_on_several_hosts() -> None:
    vne = parse(SPREAD)
    assert vne.hosts == (
        Host("alpha", "10.0.0.1", 7907, "10.0.0.1"),
        Host("beta", "beta.example", 7000, "10.0.0.2"),
        Host("gamma", "fd00::3", 7001, "10.0.0.3"),
    )
    assert [vm.host for vm in vne.vms] == ["alpha", "beta"]
    part = vne.part("beta")
    assert ([vm.name for vm in part.vms], part.here, part.hosts) == (["bob"], "beta", vne.hosts)


def test_an_address_of_ipv6_alone() -> None:
    vne = parse(SPREAD.replace("[fd00::3]:7001", "fd00::3"))
    assert vne.hosts[2] == Host("gamma", "fd00::3", 7907, "10.0.0.3")


@pytest.mark.parametrize(
    ("old", "new", "key", "message"),
    [
        ('host = "alpha"', "", "vm.alice.host", "is required where there is a table"),
        ('host = "beta"', 'host = "delta"', "vm.bob.host", "unknown host 'delta'"),
        (', tunnel = "10.0.0.2"', "", "hosts.beta.address", "'beta.example' is no IP address"),
        ('"10.0.0.2"', '"10.0.0"', "hosts.beta.tunnel", "'10.0.0' is no IP address"),
        ('"10.0.0.1"', '"10.0.0.1:0"', "hosts.alpha", "'10.0.0.1:0' is no address"),
        ('"10.0.0.1"', '"10.0.0.1:70000"', "hosts.alpha", "is no address"),
        ('"10.0.0.1"', '"a b"', "hosts.alpha", "is no address"),
        ('"10.0.0.1"', "7", "hosts.alpha", "must be a table"),
        ("alpha =", "Alpha =", "hosts.Alpha", "name"),
        ('"10.0.0.3"', '"10.0.0.2"', "hosts.gamma", "10.0.0.2 is the address of beta's tunnels already"),
        (', tunnel = "10.0.0.3"', "", "hosts.gamma", "an address of IPv6, and alpha's of IPv4"),
    ],
)
def test_faults_of_hosts(old: str, new: str, key: str, message: str) -> None:
    error = fault(SPREAD.replace(old, new))
    assert error.key == key
    assert message in str(error)


def test_vms_that_are_saved_on_another_host() -> None:
    """Their own is nothing special, wherever they are by then."""
    alice, bob = parse(SPREAD.replace("[defaults]", '[defaults]\nsaved_on = "beta"')).vms
    assert [(vm.saved_on, vm.keeper) for vm in (alice, bob)] == [("beta", "beta"), ("beta", "")]
    assert evolve(alice, host="beta").keeper == ""


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        (SPREAD.replace("[vm.bob]", '[vm.bob]\nsaved_on = "delta"'), "vm.bob.saved_on", "unknown host 'delta'"),
        (SPREAD.replace("[defaults]", '[defaults]\nsaved_on = "delta"'), "defaults.saved_on", "unknown host 'delta'"),
        (one_vm('memory = "1G"', 'kernel = "k"', 'saved_on = "beta"'), "vm.alice.saved_on", "no table [hosts]"),
        (
            SPREAD.replace("[vm.alice]", '[vm.alice]\nqmp = "/q"').replace("[vm.bob]", '[vm.bob]\nqmp = "/r"')
            + 'saved_on = "alpha"\n',
            "vm.bob.saved_on",
            "is saved on its own host",
        ),
    ],
)
def test_hosts_that_nothing_can_be_saved_on(text: str, key: str, message: str) -> None:
    error = fault(text)
    assert error.key == key
    assert message in str(error)


def test_a_host_without_a_table_of_hosts() -> None:
    error = fault(
        SPREAD.replace("[hosts]", "[network.x]")
        .replace('alpha = "10.0.0.1"', "")
        .replace("beta = {", "#")
        .replace("gamma =", "#")
    )
    assert error.key == "defaults.host"
    assert "there is no table [hosts]" in str(error)


def test_a_directory_where_a_file_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "lab.toml"
    path.write_text(one_vm('memory = "1G"', 'kernel = "."'))
    with pytest.raises(ConfigError, match="a directory, where a file is needed") as caught:
        load_description(path)
    assert caught.value.key == "vm.alice.kernel"
