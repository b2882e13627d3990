//! The device itself: what it offers, its configuration space (virtio 1.2, section 5.2.4) and the write-cache switch.

use std::sync::atomic::{AtomicBool, Ordering};

use thiserror::Error;
use vhost::vhost_user::VhostUserProtocolFeatures;

use super::capacity::Capacity;
use super::request::{MAX_ZERO_SECTORS, MAX_ZERO_SEGMENTS, SECTOR_SIZE};
use super::ring::MAX_RING_SIZE;

// Feature bits: virtio 1.2, sections 5.2.3 and 6, and the vhost-user specification.
const BLK_F_SEG_MAX: u64 = 1 << 2;
const BLK_F_RO: u64 = 1 << 5;
const BLK_F_BLK_SIZE: u64 = 1 << 6;
const BLK_F_FLUSH: u64 = 1 << 9;
const BLK_F_TOPOLOGY: u64 = 1 << 10;
pub(super) const BLK_F_CONFIG_WCE: u64 = 1 << 11;
const BLK_F_MQ: u64 = 1 << 12;
const BLK_F_DISCARD: u64 = 1 << 13;
const BLK_F_WRITE_ZEROES: u64 = 1 << 14;
pub(super) const RING_F_INDIRECT_DESC: u64 = 1 << 28;
pub(super) const RING_F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;
/// VHOST_F_LOG_ALL: not for the guest, but how a front-end switches the dirty log.
pub(super) const F_LOG_ALL: u64 = 1 << 26;
/// VHOST_USER_F_PROTOCOL_FEATURES
pub(super) const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// Bytes of configuration space that a front-end may ask for (the vhost-user specification's
/// VHOST_USER_MAX_CONFIG_SIZE). Beyond what is defined, it reads as zeros.
const CONFIG_SPACE: usize = 256;
/// Offset of `writeback`, the only field that a driver may write.
const WRITEBACK: u32 = 32;

/// Physical sector of what lies below: the file system's blocks and most drives are 4 KiB.
const PHYSICAL_BLOCK: u32 = 4096;
/// Preferred size of a large request: one unit of the dirty map.
const OPTIMAL_IO: u32 = 64 * 1024;

/// Most queues of a device. A queue costs a ring and a few descriptors; QEMU makes one per virtual processor.
const MAX_QUEUES: u16 = 256;
/// Most segments that a driver is told it may use: one vectored call's worth.
const MAX_SEG_MAX: u32 = super::MAX_DATA_SEGMENTS as u32;

/// Why a device cannot be described this way.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// Not a whole number of blocks, or none.
    #[error("a size of {0} bytes is not a whole number of {1}-byte blocks")]
    Size(u64, u32),
    /// No queues, or too many.
    #[error("{0} queues asked for; 1 to {MAX_QUEUES} are possible")]
    Queues(u16),
    /// No segments, or too many.
    #[error("seg_max is {0}; 1 to {MAX_SEG_MAX} are possible")]
    Segments(u32),
    /// The system refuses what a change of the size is told with.
    #[error("no eventfd for the device: {0}")]
    NoEvent(String),
}

/// Logical block size that the guest is told. Requests are in sectors of 512 bytes all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockSize {
    /// 512 bytes, on physical blocks of 4 KiB: boots everywhere.
    B512,
    /// 4096 bytes.
    B4096,
}

impl BlockSize {
    /// The one of `bytes`; of two, the one that any volume may have.
    pub fn of(bytes: u32) -> Self {
        if bytes == 4096 {
            BlockSize::B4096
        } else {
            BlockSize::B512
        }
    }

    /// In bytes.
    pub fn bytes(self) -> u32 {
        match self {
            BlockSize::B512 => 512,
            BlockSize::B4096 => 4096,
        }
    }
}

/// What the guest sees as the disk's serial: 20 bytes, padded with zeros, without a terminator if all are in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Serial([u8; Serial::LEN]);

impl Serial {
    /// VIRTIO_BLK_ID_BYTES
    pub const LEN: usize = 20;

    /// The first 20 bytes of a volume's identity.
    pub fn new(id: &str) -> Serial {
        let mut bytes = [0; Serial::LEN];
        let n = id.len().min(Serial::LEN);
        bytes[..n].copy_from_slice(&id.as_bytes()[..n]);
        Serial(bytes)
    }

    /// As it is sent.
    pub fn as_bytes(&self) -> &[u8; Serial::LEN] {
        &self.0
    }
}

/// One attached volume, as a device.
#[derive(Debug, Clone)]
pub struct DeviceConfig {
    /// `namespace/name`, for the log.
    pub volume: String,
    /// Size in bytes: whole blocks.
    pub size: u64,
    /// Logical block size.
    pub block_size: BlockSize,
    /// Number of virtqueues, from 1.
    pub num_queues: u16,
    /// Data segments that a driver may use in one request, from 1 to 1024. The specification wants a chain to be no
    /// longer than the ring, also through an indirect table: [`DEFAULT_SEG_MAX`](Self::DEFAULT_SEG_MAX) unless the
    /// size of the rings is known.
    pub seg_max: u32,
    /// Whether the guest is told that it cannot write.
    pub read_only: bool,
    /// Whether the write cache is on when the first guest looks (the usual state).
    pub writeback: bool,
}

impl DeviceConfig {
    /// What fits the ring of 128 entries that front-ends make by default, less a header and a status.
    pub const DEFAULT_SEG_MAX: u32 = 126;
}

/// The device while it is served. What can change under a running guest is atomic: the control thread reads it for
/// each message, others set it.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) config: DeviceConfig,
    pub(super) capacity: Capacity,
    writeback: AtomicBool,
}

impl Device {
    pub(super) fn new(config: DeviceConfig) -> Result<Device, ConfigError> {
        let block = config.block_size.bytes();
        if config.size == 0 || !config.size.is_multiple_of(u64::from(block)) {
            return Err(ConfigError::Size(config.size, block));
        }
        if config.num_queues == 0 || config.num_queues > MAX_QUEUES {
            return Err(ConfigError::Queues(config.num_queues));
        }
        if config.seg_max == 0 || config.seg_max > MAX_SEG_MAX {
            return Err(ConfigError::Segments(config.seg_max));
        }
        Ok(Device {
            capacity: Capacity::new(config.size)
                .map_err(|e| ConfigError::NoEvent(e.to_string()))?,
            writeback: AtomicBool::new(config.writeback),
            config,
        })
    }

    /// Virtio and vhost features offered. The same for every connection: a guest that reconnects must find what it
    /// had.
    pub(super) fn features(&self) -> u64 {
        let mut features = BLK_F_SEG_MAX
            | BLK_F_BLK_SIZE
            | BLK_F_FLUSH
            | BLK_F_TOPOLOGY
            | BLK_F_CONFIG_WCE
            | BLK_F_MQ
            | BLK_F_DISCARD
            | BLK_F_WRITE_ZEROES
            | RING_F_INDIRECT_DESC
            | RING_F_EVENT_IDX
            | F_VERSION_1
            | F_LOG_ALL
            | F_PROTOCOL_FEATURES;
        if self.config.read_only {
            features |= BLK_F_RO;
        }
        features
    }

    /// Protocol features offered.
    pub(super) fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::DEVICE_STATE
    }

    /// Whether a write may complete before it is durable: the guest can flush, and left the write cache on (5.2.6.2).
    pub(super) fn is_writeback(&self, acked: u64) -> bool {
        acked & BLK_F_FLUSH != 0 && self.writeback.load(Ordering::Relaxed)
    }

    /// `len` bytes of configuration space from `offset` on, or nothing when that is out of range. Fields that are
    /// not offered read as zeros.
    pub(super) fn read_config(&self, offset: u32, len: u32) -> Option<Vec<u8>> {
        let space = self.space();
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(usize::try_from(len).ok()?)?;
        space.get(start..end).map(<[u8]>::to_vec)
    }

    /// Changes configuration space. Only `writeback` can be, and only to 0 or 1.
    ///
    /// # Errors
    ///
    /// A sentence for the log.
    pub(super) fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<(), String> {
        match (offset, bytes) {
            (WRITEBACK, [value @ (0 | 1)]) => {
                self.writeback.store(*value == 1, Ordering::Relaxed);
                Ok(())
            }
            (WRITEBACK, [value]) => Err(format!("writeback cannot be {value}")),
            _ => Err(format!(
                "{} bytes at offset {offset} are not writable; only writeback is (offset {WRITEBACK}, 1 byte)",
                bytes.len()
            )),
        }
    }

    /// Where the write-cache switch is in configuration space, and how it is set.
    pub(super) fn write_cache(&self) -> (u32, u8) {
        (WRITEBACK, self.writeback.load(Ordering::Relaxed).into())
    }

    /// Largest ring that is accepted.
    pub(super) fn max_ring_size(&self) -> u16 {
        MAX_RING_SIZE
    }

    /// `struct virtio_blk_config`, little-endian.
    fn space(&self) -> [u8; CONFIG_SPACE] {
        let mut space = [0; CONFIG_SPACE];
        let mut put = |offset: usize, bytes: &[u8]| {
            space[offset..offset + bytes.len()].copy_from_slice(bytes)
        };
        let block = self.config.block_size.bytes();
        put(0, &self.capacity.sectors().to_le_bytes());
        put(12, &self.config.seg_max.to_le_bytes());
        put(20, &block.to_le_bytes());
        // Topology: log2 of logical blocks in a physical one, alignment of the first, and sizes in logical blocks.
        put(24, &[(PHYSICAL_BLOCK / block).ilog2() as u8, 0]);
        put(26, &((PHYSICAL_BLOCK / block) as u16).to_le_bytes());
        put(28, &(OPTIMAL_IO / block).to_le_bytes());
        put(
            WRITEBACK as usize,
            &[u8::from(self.writeback.load(Ordering::Relaxed))],
        );
        put(34, &self.config.num_queues.to_le_bytes());
        // Discards: longest segment, most segments, and the granularity: what file systems give back is blocks of 4 KiB.
        put(36, &MAX_ZERO_SECTORS.to_le_bytes());
        put(40, &MAX_ZERO_SEGMENTS.to_le_bytes());
        put(44, &(PHYSICAL_BLOCK / SECTOR_SIZE as u32).to_le_bytes());
        // Write-zeroes: the same, and that it may give space back.
        put(48, &MAX_ZERO_SECTORS.to_le_bytes());
        put(52, &MAX_ZERO_SEGMENTS.to_le_bytes());
        put(56, &[1]);
        space
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> DeviceConfig {
        DeviceConfig {
            volume: "default/v".into(),
            size: 1 << 30,
            block_size: BlockSize::B4096,
            num_queues: 4,
            seg_max: 254,
            read_only: false,
            writeback: true,
        }
    }

    #[test]
    fn configuration_space_follows_the_block_size() {
        for (block_size, exponent, min_io, opt_io) in
            [(BlockSize::B512, 3, 8, 128), (BlockSize::B4096, 0, 1, 16)]
        {
            let device = Device::new(DeviceConfig {
                block_size,
                ..config()
            })
            .unwrap();
            let space = device.read_config(0, 60).unwrap();
            assert_eq!(
                space[..8],
                (1u64 << 21).to_le_bytes(),
                "capacity is in sectors of 512 bytes"
            );
            assert_eq!(space[12..16], 254u32.to_le_bytes());
            assert_eq!(space[20..24], block_size.bytes().to_le_bytes());
            assert_eq!((space[24], space[25]), (exponent, 0));
            assert_eq!(space[26..28], u16::to_le_bytes(min_io));
            assert_eq!(space[28..32], u32::to_le_bytes(opt_io));
            assert_eq!(space[34..36], 4u16.to_le_bytes());
        }
    }

    #[test]
    fn configuration_space_says_what_can_be_made_zero_at_once() {
        let device = Device::new(config()).unwrap();
        assert_eq!(device.features() & (1 << 13 | 1 << 14), 1 << 13 | 1 << 14);
        let space = device.read_config(0, 60).unwrap();
        // 64 MiB in each of 32 segments, in blocks of 4 KiB.
        let numbers = [131_072u32, 32, 8, 131_072, 32];
        let expected: Vec<u8> = numbers.into_iter().flat_map(u32::to_le_bytes).collect();
        assert_eq!(space[36..56], expected);
        assert_eq!(space[56..60], [1, 0, 0, 0], "and it may give space back");
    }

    #[test]
    fn reads_of_configuration_space_are_exact_or_refused() {
        let device = Device::new(config()).unwrap();
        for (offset, len) in [(0, 0), (0, 256), (255, 1), (256, 0)] {
            assert_eq!(
                device.read_config(offset, len).map(|b| b.len()),
                Some(len as usize)
            );
        }
        for (offset, len) in [(0, 257), (256, 1), (u32::MAX, u32::MAX), (257, 0)] {
            assert_eq!(device.read_config(offset, len), None);
        }
    }

    #[test]
    fn write_back_needs_a_guest_that_can_flush_and_the_switch_on() {
        let device = Device::new(config()).unwrap();
        assert!(device.is_writeback(BLK_F_FLUSH));
        assert!(!device.is_writeback(!BLK_F_FLUSH));
        device.write_config(WRITEBACK, &[0]).unwrap();
        assert!(!device.is_writeback(BLK_F_FLUSH));
        assert!(device.write_config(WRITEBACK, &[7]).is_err());
        assert!(device.write_config(0, &[1]).is_err());
        assert!(device.write_config(WRITEBACK, &[]).is_err());
        device.write_config(WRITEBACK, &[1]).unwrap();
        assert!(device.is_writeback(BLK_F_FLUSH));
    }

    #[test]
    fn a_read_only_volume_says_so() {
        let offered = |read_only| {
            let config = DeviceConfig {
                read_only,
                ..config()
            };
            Device::new(config).unwrap().features()
        };
        assert_eq!(offered(true), offered(false) | BLK_F_RO);
        assert_eq!(offered(false) & BLK_F_RO, 0);
    }

    #[test]
    fn a_device_that_makes_no_sense_is_refused() {
        let with = |change: fn(&mut DeviceConfig)| {
            let mut config = config();
            change(&mut config);
            Device::new(config).map(|_| ()).unwrap_err()
        };
        assert_eq!(with(|c| c.size = 0), ConfigError::Size(0, 4096));
        assert_eq!(with(|c| c.size = 4096 + 512), ConfigError::Size(4608, 4096));
        assert_eq!(with(|c| c.num_queues = 0), ConfigError::Queues(0));
        assert_eq!(with(|c| c.num_queues = 257), ConfigError::Queues(257));
        assert_eq!(with(|c| c.seg_max = 0), ConfigError::Segments(0));
        assert_eq!(with(|c| c.seg_max = 1025), ConfigError::Segments(1025));
    }

    #[test]
    fn a_serial_is_twenty_bytes() {
        assert_eq!(Serial::new("abc").as_bytes()[..4], *b"abc\0");
        assert_eq!(
            *Serial::new("0123456789012345678901").as_bytes(),
            *b"01234567890123456789"
        );
    }
}
