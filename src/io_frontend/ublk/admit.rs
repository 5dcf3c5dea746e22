//! From the kernel's descriptor to what is to be done, and from what was done to the kernel's result. Pure.

use super::proto::Descriptor;
use crate::error::{Error, ErrorKind};
use crate::io_frontend::request::{Request, RequestFlags};
use crate::units::{ByteRange, SECTOR_SIZE};

/// What a descriptor asks for.
#[derive(Debug)]
pub enum Verdict {
    /// The range's bytes are to be given to the kernel.
    Read(ByteRange),
    /// The range's bytes are to be got from the kernel.
    Write { range: ByteRange, flags: RequestFlags },
    /// A request without data.
    Submit(Request),
    /// Nothing is to be done: an empty range.
    Nothing,
    /// Answer with this errno (positive).
    Refuse(i32),
}

/// Judges a descriptor. `io_bytes_max` is what the device was made with: more would not fit the kernel's window.
pub fn admit(descriptor: &Descriptor, io_bytes_max: u32) -> Verdict {
    // Its start_sector is no place: u64::MAX.
    if descriptor.op == Descriptor::FLUSH {
        return Verdict::Submit(Request::Flush);
    }
    let len = u64::from(descriptor.sectors) * SECTOR_SIZE;
    let range = descriptor.start_sector.checked_mul(SECTOR_SIZE).and_then(|start| ByteRange::new(start, len));
    let fua = if descriptor.flags & Descriptor::FUA != 0 { RequestFlags::FUA } else { RequestFlags::empty() };
    match (descriptor.op, range) {
        (Descriptor::READ | Descriptor::WRITE, _) if len > u64::from(io_bytes_max) => Verdict::Refuse(libc::EINVAL),
        (Descriptor::READ, Some(range)) => Verdict::Read(range),
        (Descriptor::WRITE, Some(range)) => Verdict::Write { range, flags: fua },
        (Descriptor::DISCARD, Some(range)) => Verdict::Submit(Request::Trim { range, flags: fua }),
        (Descriptor::WRITE_ZEROES, Some(range)) => {
            let keeps_space = descriptor.flags & Descriptor::NOUNMAP != 0;
            let no_hole = if keeps_space { RequestFlags::NO_HOLE } else { RequestFlags::empty() };
            Verdict::Submit(Request::WriteZeroes { range, flags: fua | no_hole })
        }
        (Descriptor::DISCARD | Descriptor::WRITE_ZEROES, None) if len == 0 => Verdict::Nothing,
        (Descriptor::READ | Descriptor::WRITE | Descriptor::DISCARD | Descriptor::WRITE_ZEROES, None) => {
            Verdict::Refuse(libc::EINVAL)
        }
        _ => Verdict::Refuse(libc::EOPNOTSUPP),
    }
}

/// The errno (positive) that the block layer is told. It has a meaning for a few only, and for some the wrong one: it
/// would try EAGAIN and EBUSY again, and takes EREMCHG for a word of device-mapper. Those are EIO.
pub fn errno_of(error: &Error) -> i32 {
    match error.errno() {
        known @ (libc::EINVAL | libc::ENOSPC | libc::EOPNOTSUPP | libc::ETIMEDOUT | libc::ENODATA | libc::EILSEQ) => {
            known
        }
        _ => libc::EIO,
    }
}

/// Whether the request was turned away because the clone ends, and not carried out.
pub fn is_turned_away(error: &Error) -> bool {
    error.kind() == ErrorKind::Shutdown
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAX: u32 = 512 << 10;

    fn descriptor(op: u8, flags: u32, start_sector: u64, sectors: u32) -> Descriptor {
        Descriptor { op, flags, sectors, start_sector }
    }
    fn said(op: u8, flags: u32, start_sector: u64, sectors: u32) -> String {
        format!("{:?}", admit(&descriptor(op, flags, start_sector, sectors), MAX))
    }

    #[test]
    fn operations() {
        assert_eq!(said(Descriptor::READ, 0, 1, 8), "Read(512..4608)");
        assert_eq!(said(Descriptor::WRITE, 0, 0, 1), "Write { range: 0..512, flags: RequestFlags(0x0) }");
        let fua = "Write { range: 0..512, flags: RequestFlags(FUA) }";
        assert_eq!(said(Descriptor::WRITE, Descriptor::FUA, 0, 1), fua);
        assert_eq!(said(Descriptor::FLUSH, 0, u64::MAX, 0), "Submit(Flush)");
        assert_eq!(said(Descriptor::FLUSH, Descriptor::FUA, 3, 9), "Submit(Flush)");
        let trim = "Submit(Trim { range: 0..4294967296, flags: RequestFlags(0x0) })";
        assert_eq!(said(Descriptor::DISCARD, 0, 0, 1 << 23), trim);
        let zeroes = "Submit(WriteZeroes { range: 0..512, flags: RequestFlags(FUA | NO_HOLE) })";
        assert_eq!(said(Descriptor::WRITE_ZEROES, Descriptor::FUA | Descriptor::NOUNMAP, 0, 1), zeroes);
    }

    #[test]
    fn odd_ones() {
        assert_eq!(said(Descriptor::READ, 0, 0, MAX / 512 + 1), "Refuse(22)");
        assert_eq!(said(Descriptor::WRITE, 0, 0, 0), "Refuse(22)");
        assert_eq!(said(Descriptor::WRITE, 0, u64::MAX, 1), "Refuse(22)");
        assert_eq!(said(Descriptor::READ, 0, u64::MAX / 512, 8), "Refuse(22)");
        assert_eq!(said(Descriptor::DISCARD, 0, 5, 0), "Nothing");
        assert_eq!(said(Descriptor::WRITE_ZEROES, 0, u64::MAX, 1), "Refuse(22)");
        for op in [4, 6, 7, 255] {
            assert_eq!(said(op, 0, 0, 1), "Refuse(95)", "operation {op}");
        }
    }

    proptest! {
        #[test]
        fn never_more_than_fits(op: u8, flags: u32, start: u64, sectors: u32) {
            match admit(&descriptor(op, flags, start, sectors), MAX) {
                Verdict::Read(range) | Verdict::Write { range, .. } => prop_assert!(range.len() <= u64::from(MAX)),
                _ => {}
            }
        }
    }

    #[test]
    fn errnos_that_the_block_layer_knows() {
        for (errno, told) in [
            (libc::EIO, libc::EIO),
            (libc::EAGAIN, libc::EIO),
            (libc::EBUSY, libc::EIO),
            (libc::ENOSPC, libc::ENOSPC),
            (libc::EOPNOTSUPP, libc::EOPNOTSUPP),
            (libc::ENODATA, libc::ENODATA),
        ] {
            assert_eq!(errno_of(&Error::io(errno, "x")), told, "errno {errno}");
        }
        assert_eq!(errno_of(&Error::new(ErrorKind::Shutdown, "x")), libc::EIO);
        assert!(is_turned_away(&Error::new(ErrorKind::Shutdown, "x")) && !is_turned_away(&Error::io(libc::EIO, "x")));
    }
}
