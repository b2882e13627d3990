//! One copy of a volume on disk: its bytes, and beside them what must be remembered to trust those bytes after a
//! crash. The format, and why it survives one, is docs/DISK-FORMAT.md.
//!
//! [`Metadata`] is sans-IO: it turns a change (a new superblock, regions that became active, a page of a bitmap) into
//! [`MetaWrite`]s and reads itself back through [`ReadAt`], so that a simulator runs it on simulated sectors.
//! [`Store`] is the real files of one copy, [`Growth`] makes them longer, [`NodeDir`] the directory that holds all copies of a node.

mod bitmap;
mod growth;
pub mod layout;
mod log;
mod metadata;
mod node_dir;
mod os;
mod sector;
mod store;
mod superblock;
#[cfg(test)]
mod tests;

pub use growth::{Growth, GrowthError};
pub use layout::{BITS_PER_PAGE, BLOCK};
pub use metadata::{FormatError, Half, Loaded, LogImage, MetaWrite, Metadata, ReadAt, Warning};
pub use node_dir::{NodeDir, NodeDirError};
pub use store::{Store, StoreError};
pub use superblock::FORMAT_VERSION;
