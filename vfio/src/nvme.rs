//! Terms of the NVM Express Base Specification, revision 1.4, that the software controller,
//! the engine and the test driver share. Sections are cited as `NVMe 1.4 §…`.

/// Size of a submission queue entry in bytes (NVMe 1.4 §4.2).
pub const SQE_SIZE: usize = 64;
/// Size of a completion queue entry in bytes (NVMe 1.4 §4.6).
pub const CQE_SIZE: usize = 16;
/// The memory page size that everything here uses: `CC.MPS` = 0.
pub const PAGE_SIZE: usize = 4096;
/// Base and length of the doorbell array with `CAP.DSTRD` = 0 (NVMe 1.4 §3.1.24).
pub const DOORBELL_BASE: u64 = 0x1000;
/// PCI class code of an NVM Express I/O controller: mass storage, non-volatile, NVMe.
pub const PCI_CLASS: u32 = 0x01_08_02;

/// Controller registers, as offsets into BAR0 (NVMe 1.4 §3.1).
pub mod reg {
    /// Controller capabilities, 64 bits.
    pub const CAP: u64 = 0x00;
    /// Version.
    pub const VS: u64 = 0x08;
    /// Interrupt mask set.
    pub const INTMS: u64 = 0x0c;
    /// Interrupt mask clear.
    pub const INTMC: u64 = 0x10;
    /// Controller configuration.
    pub const CC: u64 = 0x14;
    /// Controller status.
    pub const CSTS: u64 = 0x1c;
    /// NVM subsystem reset.
    pub const NSSR: u64 = 0x20;
    /// Admin queue attributes.
    pub const AQA: u64 = 0x24;
    /// Admin submission queue base address, 64 bits.
    pub const ASQ: u64 = 0x28;
    /// Admin completion queue base address, 64 bits.
    pub const ACQ: u64 = 0x30;
    /// Controller memory buffer location.
    pub const CMBLOC: u64 = 0x38;
    /// Controller memory buffer size.
    pub const CMBSZ: u64 = 0x3c;
}

/// Bits of `CC` (NVMe 1.4 §3.1.5).
pub mod cc {
    /// Enable.
    pub const EN: u32 = 1;
    /// Shutdown notification: mask of the two bits.
    pub const SHN_MASK: u32 = 3 << 14;
    /// I/O submission queue entry size: shift of the four bits (log2 of bytes).
    pub const IOSQES_SHIFT: u32 = 16;
    /// I/O completion queue entry size: shift of the four bits (log2 of bytes).
    pub const IOCQES_SHIFT: u32 = 20;
    /// Command set selected: mask of the three bits.
    pub const CSS_MASK: u32 = 7 << 4;
    /// Memory page size: mask of the four bits (page is 2^(12 + MPS)).
    pub const MPS_MASK: u32 = 0xf << 7;
    /// Arbitration mechanism selected: mask of the three bits; 0 is round robin.
    pub const AMS_MASK: u32 = 7 << 11;
}

/// Bits of `CSTS` (NVMe 1.4 §3.1.6).
pub mod csts {
    /// Ready.
    pub const RDY: u32 = 1;
    /// Controller fatal status.
    pub const CFS: u32 = 1 << 1;
    /// Shutdown status: mask of the two bits.
    pub const SHST_MASK: u32 = 3 << 2;
    /// Shutdown status: complete.
    pub const SHST_COMPLETE: u32 = 2 << 2;
}

/// Fields of `CAP` (NVMe 1.4 §3.1.1).
pub mod cap {
    /// Maximum queue entries supported, 0's based: mask.
    pub const MQES_MASK: u64 = 0xffff;
    /// Contiguous queues required.
    pub const CQR: u64 = 1 << 16;
    /// Time-out, in units of 500 ms: shift of the eight bits.
    pub const TO_SHIFT: u32 = 24;
    /// Doorbell stride: mask of the four bits (stride is 2^(2 + DSTRD) bytes).
    pub const DSTRD_MASK: u64 = 0xf << 32;
    /// Shift of `DSTRD`.
    pub const DSTRD_SHIFT: u32 = 32;
    /// NVM subsystem reset supported.
    pub const NSSRS: u64 = 1 << 36;
    /// Command sets supported: the NVM command set.
    pub const CSS_NVM: u64 = 1 << 37;
    /// Command sets supported: mask of the eight bits.
    pub const CSS_MASK: u64 = 0xff << 37;
    /// Boot partition support.
    pub const BPS: u64 = 1 << 45;
    /// Memory page size minimum: mask of the four bits.
    pub const MPSMIN_MASK: u64 = 0xf << 48;
    /// Memory page size maximum: mask of the four bits.
    pub const MPSMAX_MASK: u64 = 0xf << 52;
    /// Persistent memory region supported.
    pub const PMRS: u64 = 1 << 56;
    /// Controller memory buffer supported.
    pub const CMBS: u64 = 1 << 57;
}

/// Admin opcodes (NVMe 1.4 §5, figure 139).
pub mod admin {
    #![allow(missing_docs, reason = "the names are the specification's own")]
    pub const DELETE_SQ: u8 = 0x00;
    pub const CREATE_SQ: u8 = 0x01;
    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const DELETE_CQ: u8 = 0x04;
    pub const CREATE_CQ: u8 = 0x05;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const GET_FEATURES: u8 = 0x0a;
    pub const ASYNC_EVENT: u8 = 0x0c;
    pub const NAMESPACE_MANAGEMENT: u8 = 0x0d;
    pub const FIRMWARE_COMMIT: u8 = 0x10;
    pub const FIRMWARE_DOWNLOAD: u8 = 0x11;
    pub const SELF_TEST: u8 = 0x14;
    pub const NAMESPACE_ATTACHMENT: u8 = 0x15;
    pub const KEEP_ALIVE: u8 = 0x18;
    pub const DIRECTIVE_SEND: u8 = 0x19;
    pub const DIRECTIVE_RECEIVE: u8 = 0x1a;
    pub const VIRTUALIZATION: u8 = 0x1c;
    pub const MI_SEND: u8 = 0x1d;
    pub const MI_RECEIVE: u8 = 0x1e;
    pub const DOORBELL_BUFFER: u8 = 0x7c;
    pub const FORMAT: u8 = 0x80;
    pub const SECURITY_SEND: u8 = 0x81;
    pub const SECURITY_RECEIVE: u8 = 0x82;
    pub const SANITIZE: u8 = 0x84;
    pub const GET_LBA_STATUS: u8 = 0x86;
}

/// Feature identifiers (NVMe 1.4 §5.21.1, figure 271).
pub mod feature {
    #![allow(missing_docs, reason = "the names are the specification's own")]
    pub const ARBITRATION: u8 = 0x01;
    pub const POWER_MANAGEMENT: u8 = 0x02;
    pub const TEMPERATURE_THRESHOLD: u8 = 0x04;
    pub const ERROR_RECOVERY: u8 = 0x05;
    pub const VOLATILE_WRITE_CACHE: u8 = 0x06;
    pub const NUMBER_OF_QUEUES: u8 = 0x07;
    pub const INTERRUPT_COALESCING: u8 = 0x08;
    pub const INTERRUPT_VECTOR: u8 = 0x09;
    pub const WRITE_ATOMICITY: u8 = 0x0a;
    pub const ASYNC_EVENTS: u8 = 0x0b;
}

/// Which value Get Features is asked for, CDW10 10:8 (NVMe 1.4 figure 172).
pub mod select {
    #![allow(missing_docs, reason = "the names are the specification's own")]
    pub const CURRENT: u32 = 0;
    pub const DEFAULT: u32 = 1;
    pub const SAVED: u32 = 2;
    pub const CAPABILITIES: u32 = 3;
}

/// Log page identifiers (NVMe 1.4 §5.14.1, figure 191).
pub mod log_page {
    #![allow(missing_docs, reason = "the names are the specification's own")]
    pub const ERROR: u8 = 0x01;
    pub const SMART: u8 = 0x02;
    pub const FIRMWARE_SLOT: u8 = 0x03;
}

/// Which data structure Identify is asked for, CDW10 7:0 (NVMe 1.4 figure 244).
pub mod cns {
    #![allow(missing_docs, reason = "the names are the specification's own")]
    pub const NAMESPACE: u8 = 0x00;
    pub const CONTROLLER: u8 = 0x01;
    pub const NAMESPACE_LIST: u8 = 0x02;
    pub const DESCRIPTORS: u8 = 0x03;
}

/// NVM command set opcodes (NVMe 1.4 §6, figure 346).
pub mod nvm {
    #![allow(missing_docs, reason = "the names are the specification's own")]
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const WRITE_UNCORRECTABLE: u8 = 0x04;
    pub const COMPARE: u8 = 0x05;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    pub const VERIFY: u8 = 0x0c;
    pub const RESERVATION_REGISTER: u8 = 0x0d;
    pub const RESERVATION_REPORT: u8 = 0x0e;
    pub const RESERVATION_ACQUIRE: u8 = 0x11;
    pub const RESERVATION_RELEASE: u8 = 0x15;
    pub const COPY: u8 = 0x19;
}

/// A command's outcome: bits 14:0 of the status field, without the phase tag
/// (NVMe 1.4 §4.6.1): status code in 7:0, status code type in 10:8, more in 13, do not
/// retry in 14.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Status(pub u16);

impl Status {
    #![allow(missing_docs, reason = "the names are the specification's own")]
    const DNR: u16 = 1 << 14;
    pub const SUCCESS: Self = Self(0);
    pub const INVALID_OPCODE: Self = Self(0x01 | Self::DNR);
    pub const INVALID_FIELD: Self = Self(0x02 | Self::DNR);
    pub const CID_CONFLICT: Self = Self(0x03 | Self::DNR);
    /// Without do-not-retry: the transfer may work the next time.
    pub const DATA_TRANSFER_ERROR: Self = Self(0x04);
    pub const INTERNAL_ERROR: Self = Self(0x06);
    pub const ABORT_REQUESTED: Self = Self(0x07);
    pub const ABORTED_SQ_DELETION: Self = Self(0x08);
    pub const INVALID_NAMESPACE: Self = Self(0x0b | Self::DNR);
    pub const COMMAND_SEQUENCE_ERROR: Self = Self(0x0c | Self::DNR);
    pub const INVALID_PRP_OFFSET: Self = Self(0x13 | Self::DNR);
    pub const LBA_OUT_OF_RANGE: Self = Self(0x80 | Self::DNR);
    pub const CAPACITY_EXCEEDED: Self = Self(0x81 | Self::DNR);
    pub const NAMESPACE_NOT_READY: Self = Self(0x82);
    // Command specific, status code type 1.
    pub const INVALID_CQ: Self = Self(0x100 | Self::DNR);
    pub const INVALID_QID: Self = Self(0x101 | Self::DNR);
    pub const INVALID_QUEUE_SIZE: Self = Self(0x102 | Self::DNR);
    pub const ABORT_LIMIT_EXCEEDED: Self = Self(0x103);
    pub const AER_LIMIT_EXCEEDED: Self = Self(0x105 | Self::DNR);
    pub const INVALID_FIRMWARE_SLOT: Self = Self(0x106 | Self::DNR);
    pub const INVALID_VECTOR: Self = Self(0x108 | Self::DNR);
    pub const INVALID_LOG_PAGE: Self = Self(0x109 | Self::DNR);
    pub const INVALID_QUEUE_DELETION: Self = Self(0x10c | Self::DNR);
    pub const FEATURE_NOT_SAVEABLE: Self = Self(0x10d | Self::DNR);
    pub const FEATURE_NOT_CHANGEABLE: Self = Self(0x10e | Self::DNR);
    pub const FEATURE_NOT_NAMESPACE_SPECIFIC: Self = Self(0x10f | Self::DNR);
    // Media and data integrity errors, status code type 2.
    pub const WRITE_FAULT: Self = Self(0x280);
    pub const UNRECOVERED_READ: Self = Self(0x281);
    pub const COMPARE_FAILURE: Self = Self(0x285 | Self::DNR);

    /// The same status, with a word to the host that trying again does not help.
    pub const fn with_dnr(self) -> Self {
        Self(self.0 | Self::DNR)
    }

    /// Whether the command succeeded.
    pub fn is_success(self) -> bool {
        self.0 & 0x7ff == 0
    }
}

/// A submission queue entry: 64 bytes, little endian (NVMe 1.4 §4.2). A plain copy: reading
/// it never touches shared memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SubmissionEntry(pub [u8; SQE_SIZE]);

impl SubmissionEntry {
    /// An entry of zeroes with this opcode.
    pub fn new(opcode: u8) -> Self {
        let mut entry = Self([0; SQE_SIZE]);
        entry.0[0] = opcode;
        entry
    }
    /// Command dword `n`, 0 to 15.
    pub fn dword(&self, n: usize) -> u32 {
        let mut word = [0; 4];
        word.copy_from_slice(&self.0[n * 4..n * 4 + 4]);
        u32::from_le_bytes(word)
    }
    /// Sets command dword `n`, 0 to 15.
    pub fn set_dword(&mut self, n: usize, value: u32) {
        self.0[n * 4..n * 4 + 4].copy_from_slice(&value.to_le_bytes());
    }
    fn qword(&self, at: usize) -> u64 {
        u64::from(self.dword(at / 4)) | u64::from(self.dword(at / 4 + 1)) << 32
    }
    fn set_qword(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    /// Opcode, CDW0 7:0.
    pub fn opcode(&self) -> u8 {
        self.0[0]
    }
    /// Fused operation, CDW0 9:8.
    pub fn fuse(&self) -> u8 {
        self.0[1] & 3
    }
    /// PRP or SGL for data transfer, CDW0 15:14; 0 is PRP.
    pub fn psdt(&self) -> u8 {
        self.0[1] >> 6
    }
    /// Sets the second byte of CDW0 (fuse and PSDT) to zero: no fusing, PRPs.
    pub fn clear_flags(&mut self) {
        self.0[1] = 0;
    }
    /// Command identifier, CDW0 31:16.
    pub fn cid(&self) -> u16 {
        u16::from_le_bytes([self.0[2], self.0[3]])
    }
    /// Sets the command identifier.
    pub fn set_cid(&mut self, cid: u16) {
        self.0[2..4].copy_from_slice(&cid.to_le_bytes());
    }
    /// Namespace identifier, CDW1.
    pub fn nsid(&self) -> u32 {
        self.dword(1)
    }
    /// Sets the namespace identifier.
    pub fn set_nsid(&mut self, nsid: u32) {
        self.set_dword(1, nsid);
    }
    /// Metadata pointer, bytes 16 to 23.
    pub fn mptr(&self) -> u64 {
        self.qword(16)
    }
    /// Sets the metadata pointer.
    pub fn set_mptr(&mut self, address: u64) {
        self.set_qword(16, address);
    }
    /// PRP entry 1, bytes 24 to 31.
    pub fn prp1(&self) -> u64 {
        self.qword(24)
    }
    /// PRP entry 2, bytes 32 to 39.
    pub fn prp2(&self) -> u64 {
        self.qword(32)
    }
    /// Sets both PRP entries.
    pub fn set_prps(&mut self, prp1: u64, prp2: u64) {
        self.set_qword(24, prp1);
        self.set_qword(32, prp2);
    }
    /// Starting LBA of an I/O command, CDW10 and CDW11.
    pub fn slba(&self) -> u64 {
        self.qword(40)
    }
    /// Sets the starting LBA.
    pub fn set_slba(&mut self, lba: u64) {
        self.set_qword(40, lba);
    }
    /// Number of logical blocks of an I/O command: CDW12 15:0 plus one.
    pub fn blocks(&self) -> u32 {
        (self.dword(12) & 0xffff) + 1
    }
}

impl std::fmt::Debug for SubmissionEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Sqe(opcode {:#04x}, cid {}, nsid {:#x}, prp {:#x} {:#x}, cdw10.. {:x} {:x} {:x})",
            self.opcode(),
            self.cid(),
            self.nsid(),
            self.prp1(),
            self.prp2(),
            self.dword(10),
            self.dword(11),
            self.dword(12)
        )
    }
}

/// A completion queue entry as its four dwords (NVMe 1.4 §4.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompletionEntry {
    /// Dword 0 in the low half, dword 1 in the high half: the command's result.
    pub result: u64,
    /// Where the controller's head of the submission queue is.
    pub sq_head: u16,
    /// Which submission queue the command came from.
    pub sq_id: u16,
    /// Which command.
    pub cid: u16,
    /// Its outcome.
    pub status: Status,
    /// The phase tag.
    pub phase: bool,
}

impl CompletionEntry {
    /// The entry as two little-endian quadwords, in memory order. The second one holds the
    /// phase tag: whoever stores the entry stores it last.
    pub fn to_qwords(self) -> [u64; 2] {
        let status = (self.status.0 << 1) | u16::from(self.phase);
        [
            self.result,
            u64::from(self.sq_head)
                | u64::from(self.sq_id) << 16
                | u64::from(self.cid) << 32
                | u64::from(status) << 48,
        ]
    }

    /// The entry from its two quadwords.
    pub fn from_qwords(qwords: [u64; 2]) -> Self {
        let [result, rest] = qwords;
        let status = (rest >> 48) as u16;
        Self {
            result,
            sq_head: rest as u16,
            sq_id: (rest >> 16) as u16,
            cid: (rest >> 32) as u16,
            status: Status(status >> 1),
            phase: status & 1 == 1,
        }
    }
}
