//! The tables by which the guest finds its processors and devices: hardware-reduced ACPI, nothing else.
//!
//! ```text
//!   RSDP -> XSDT -> FADT -> DSDT   how to sleep and reset; the devices
//!                -> MADT           processors and interrupt controllers
//! ```
//!
//! # Rules
//! 1. No hardware of a PC is told of that is not there: no PM timer, no SCI, no embedded controller, no keyboard.
//! 2. Each virtio device is `LNRO0005` with its registers and interrupt; COM1 is `PNP0501`; events of the machine come
//!    through one generic event device (`ACPI0013`), which names what happened: the power button, or a new generation id.
//! 3. Interrupts are edges, as KVM sends them for a descriptor.
//!
//! # Why a crate
//! `acpi_tables` is the one that Cloud Hypervisor and others keep up; a compiler for ASL at build time would be one more
//! thing to install, and tables by hand are checksums and package lengths waiting to be wrong.

use acpi_tables::aml::{
    And, Device, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local,
    Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use super::memory::Memory;
use super::power::{BUTTON, GENERATION, OFF, RESET_VALUE};
use crate::error::{Error, Result};

const OEM: [u8; 6] = *b"AFTIMG";
const TABLE: [u8; 8] = *b"AFTERIMG";
const REVISION: u32 = 1;
/// Bytes of the header of a table.
const HEADER: u32 = 36;
/// What a table begins at a multiple of.
const ALIGN: u64 = 16;
/// Says that something has happened to a device; what it means is up to the device.
const STATUS_CHANGED: u8 = 0x80;

/// Writes the tables, and returns where the guest begins to read.
///
/// # Errors
/// When they outgrow their place.
pub(super) fn write(memory: &Memory, cpus: u8, virtio: usize) -> Result<GuestAddress> {
    let mut bytes = vec![0; Rsdp::len()];
    let dsdt = add(&mut bytes, &dsdt(virtio));
    let fadt = add(&mut bytes, &fadt(dsdt));
    let madt = add(&mut bytes, &madt(cpus));
    let mut list = XSDT::new(OEM, TABLE, REVISION);
    list.add_entry(fadt);
    list.add_entry(madt);
    let list = add(&mut bytes, &list);
    let mut root = Vec::new();
    Rsdp::new(OEM, list).to_aml_bytes(&mut root);
    bytes[..root.len()].copy_from_slice(&root);
    if bytes.len() > layout::ACPI_MAX {
        return Err(Error::failed("the tables of the guest have no room: it has too many devices"));
    }
    let cannot = |e| Error::failed("the tables of the guest do not lie in its memory").because(e);
    memory.write_slice(&bytes, layout::ACPI).map_err(cannot)?;
    Ok(layout::ACPI)
}

/// Adds a table and returns its address.
fn add(bytes: &mut Vec<u8>, table: &dyn Aml) -> u64 {
    let at = (bytes.len() as u64).next_multiple_of(ALIGN);
    bytes.resize(crate::units::to_usize(at), 0);
    table.to_aml_bytes(bytes);
    layout::ACPI.0 + at
}

fn port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port))
}

fn fadt(dsdt: u64) -> impl Aml {
    // No VGA, no keyboard controller, no CMOS clock; COM1 is in the DSDT.
    const NO_VGA: u16 = 1 << 2;
    const NO_CMOS_CLOCK: u16 = 1 << 5;
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    fadt.reset_reg = port(layout::RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(TABLE).into();
    fadt.finalize()
}

fn madt(cpus: u8) -> impl Aml {
    let mut madt = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(layout::LOCAL_APIC));
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt
}

fn dsdt(virtio: usize) -> impl Aml {
    let mut body = Vec::new();
    for index in 0..virtio {
        add_virtio(&mut body, index);
    }
    add_serial(&mut body);
    add_events(&mut body);
    let off = Package::new(vec![&OFF]);
    let sleep = Name::new(Path::new("_S5_"), &off);
    let mut table = Sdt::new(*b"DSDT", HEADER, 6, OEM, TABLE, REVISION);
    let mut bytes = Vec::new();
    sleep.to_aml_bytes(&mut bytes);
    let inner = Raw(body);
    Scope::new(Path::new("_SB_"), vec![&inner]).to_aml_bytes(&mut bytes);
    table.append_slice(&bytes);
    table
}

/// Code that is made already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn edge(irq: u32) -> Interrupt {
    let (consumer, is_edge, active_low, shared) = (true, true, false, false);
    Interrupt::new(consumer, is_edge, active_low, shared, irq)
}

fn add_virtio(body: &mut Vec<u8>, index: usize) {
    let base = u32::try_from(layout::virtio_base(index)).expect("below 4 GiB");
    let step = u32::try_from(layout::VIRTIO_STEP).expect("a page");
    let registers = Memory32Fixed::new(true, base, step);
    let interrupt = edge(layout::virtio_irq(index));
    let number = u8::try_from(index).expect("a handful");
    Device::new(
        Path::new(&format!("VR{number:02X}")),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &number),
            // Its memory is coherent with that of the processors.
            &Name::new(Path::new("_CCA"), &aml::ONE),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&registers, &interrupt])),
        ],
    )
    .to_aml_bytes(body);
}

fn add_serial(body: &mut Vec<u8>) {
    let ports = u8::try_from(layout::SERIAL_PORTS).expect("eight");
    let io = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, ports);
    let interrupt = edge(layout::SERIAL_IRQ);
    Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_DDN"), &"COM1"),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&io, &interrupt])),
        ],
    )
    .to_aml_bytes(body);
}

/// The power button, the generation id, and the device through which both are told of.
fn add_events(body: &mut Vec<u8>) {
    Device::new(Path::new("PWRB"), vec![&Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0C0C"))])
        .to_aml_bytes(body);
    let at = u32::try_from(layout::GENERATION.0).expect("below a megabyte");
    Device::new(
        Path::new("VGEN"),
        vec![
            &Name::new(Path::new("_HID"), &"AFTI0001"),
            &Name::new(Path::new("_CID"), &"VM_Gen_Counter"),
            &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
            &Name::new(Path::new("ADDR"), &Package::new(vec![&at, &ZERO])),
        ],
    )
    .to_aml_bytes(body);
    let field = Field::new(
        Path::new("EREG"),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"EVTS", 8)],
    );
    let (happened, test, button, generation) = (Local(0), Local(1), Path::new("PWRB"), Path::new("VGEN"));
    let (read, status) = (Path::new("EVTS"), STATUS_CHANGED);
    // Reading clears it, so it is read once.
    let look = Store::new(&happened, &read);
    let (is_button, is_generation) = (And::new(&test, &happened, &BUTTON), And::new(&test, &happened, &GENERATION));
    let (button, generation) = (Notify::new(&button, &status), Notify::new(&generation, &status));
    let (button_told, generation_told) = (Equal::new(&test, &BUTTON), Equal::new(&test, &GENERATION));
    let (tell_button, tell_generation) =
        (If::new(&button_told, vec![&button]), If::new(&generation_told, vec![&generation]));
    let (arguments, serialized) = (1, true);
    let tell = Method::new(
        Path::new("_EVT"),
        arguments,
        serialized,
        vec![&look, &is_button, &tell_button, &is_generation, &tell_generation],
    );
    Device::new(
        Path::new("GED_"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&edge(layout::EVENT_IRQ)])),
            &OpRegion::new(Path::new("EREG"), OpRegionSpace::SystemIO, &layout::EVENTS, &aml::ONE),
            &field,
            &tell,
        ],
    )
    .to_aml_bytes(body);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Follows the tables as a guest does, checks each, and returns their names.
    fn names(memory: &Memory) -> Vec<String> {
        let read = |at: u64, len: usize| {
            let mut bytes = vec![0; len];
            memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            bytes
        };
        let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        let root = read(layout::ACPI.0, 36);
        assert_eq!((&root[..8], sum(&root[..20]), sum(&root)), (&b"RSD PTR "[..], 0, 0));
        let mut found = Vec::new();
        let mut next = vec![u64::from_le_bytes(root[24..32].try_into().unwrap())];
        while let Some(at) = next.pop() {
            let len = u32::from_le_bytes(read(at + 4, 4).try_into().unwrap());
            let table = read(at, len as usize);
            assert_eq!(sum(&table), 0);
            let name = String::from_utf8(table[..4].to_vec()).unwrap();
            match name.as_str() {
                "XSDT" => {
                    next.extend(table[36..].chunks(8).map(|entry| u64::from_le_bytes(entry.try_into().unwrap())));
                }
                "FACP" => next.push(u64::from_le_bytes(table[140..148].try_into().unwrap())),
                _ => {}
            }
            found.push(name);
        }
        found
    }

    #[test]
    fn every_table_is_found_and_sums_to_zero() {
        for (cpus, devices) in [(1, 0), (64, layout::VIRTIO_MAX)] {
            let memory = super::super::memory::make(4 << 20).unwrap();
            assert_eq!(write(&memory, cpus, devices).unwrap(), layout::ACPI);
            let mut names = names(&memory);
            names.sort();
            assert_eq!(names, ["APIC", "DSDT", "FACP", "XSDT"]);
        }
    }
}
