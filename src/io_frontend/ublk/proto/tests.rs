//! Golden bytes, as the C compiler lays the structures of `ublk_cmd.h` out on a little-endian machine.

use super::*;

#[test]
fn opcodes() {
    let expected = [
        (Control::GetDeviceInfo, 0x8020_7502),
        (Control::GetParameters, 0x8020_7509),
        (Control::GetFeatures, 0x8020_7513),
        (Control::AddDevice, 0xc020_7504),
        (Control::DeleteDevice, 0x8020_7514),
        (Control::StartDevice, 0xc020_7506),
        (Control::StopDevice, 0xc020_7507),
        (Control::SetParameters, 0xc020_7508),
        (Control::StartRecovery, 0xc020_7510),
        (Control::EndRecovery, 0xc020_7511),
        (Control::UpdateSize, 0xc020_7515),
    ];
    for (control, opcode) in expected {
        assert_eq!(control.opcode(), opcode, "{}", control.name());
    }
    assert_eq!((Io::Fetch.opcode(), Io::CommitAndFetch.opcode()), (0xc010_7520, 0xc010_7521));
}

#[test]
fn commands() {
    let bytes = control_command(0x0102_0304, 0x1112_1314_1516_1718, 64, 0x2122_2324_2526_2728);
    let expected = [
        4, 3, 2, 1, 0xff, 0xff, 64, 0, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11, //
        0x28, 0x27, 0x26, 0x25, 0x24, 0x23, 0x22, 0x21, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    assert_eq!(bytes, expected);
    assert_eq!(io_command(3, 0x1234, -5), [3, 0, 0x34, 0x12, 0xfb, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn device_info_is_read_as_it_is_written() {
    let info = DeviceInfo {
        queues: 2,
        depth: 128,
        state: State::Quiesced,
        io_bytes_max: 0x8_0000,
        number: NUMBER_ANY,
        pid: -1,
        flags: Features::NEEDED,
        owner: 0x0102_0304_0506_0708,
    };
    let mut expected = [0; 64];
    expected[..20].copy_from_slice(&[2, 0, 128, 0, 2, 0, 0, 0, 0, 0, 8, 0, 255, 255, 255, 255, 255, 255, 255, 255]);
    expected[24] = 0b1101_1000;
    expected[32..40].copy_from_slice(&[8, 7, 6, 5, 4, 3, 2, 1]);
    assert_eq!(info.encode(), expected);
    assert_eq!(DeviceInfo::decode(&expected), info);
    let all_ones = DeviceInfo::decode(&[0xff; 64]);
    assert_eq!((all_ones.state, all_ones.encode()[24..40].to_vec()), (State::Other(0xffff), vec![0xff; 16]));
}

#[test]
fn parameters_are_read_as_they_are_written() {
    let parameters = Parameters {
        attributes: Attributes::VOLATILE_CACHE | Attributes::FUA,
        logical_block_shift: 9,
        physical_block_shift: 12,
        io_opt_shift: 16,
        io_min_shift: 15,
        sectors_max: 0x400,
        sectors: 0x1_0203_0405,
        discard_granularity: 0x1_0000,
        discard_sectors_max: 0x77,
        write_zeroes_sectors_max: 0x88,
    };
    let mut expected = [0; 60];
    expected[..20].copy_from_slice(&[60, 0, 0, 0, 3, 0, 0, 0, 12, 0, 0, 0, 9, 12, 16, 15, 0, 4, 0, 0]);
    expected[24..29].copy_from_slice(&[5, 4, 3, 2, 1]);
    expected[46] = 1;
    (expected[48], expected[52], expected[56]) = (0x77, 0x88, 1);
    assert_eq!(parameters.encode(), expected);
    assert_eq!(Parameters::decode(&expected), parameters);
    let without = Parameters { discard_sectors_max: 0, ..parameters };
    assert_eq!(without.encode()[48..58], [0, 0, 0, 0, 0x88, 0, 0, 0, 0, 0], "no segments without discards");
    assert_eq!(Parameters::question()[..4], [60, 0, 0, 0]);
}

#[test]
fn descriptors() {
    let mut bytes = [0xff; 24];
    let all_ones = Descriptor::decode(&bytes);
    assert_eq!((all_ones.op, all_ones.flags, all_ones.sectors), (255, 0xffff_ff00, u32::MAX));
    bytes[..16].copy_from_slice(&[1, 0x20, 0, 0, 8, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    let write = Descriptor { op: Descriptor::WRITE, flags: Descriptor::FUA, sectors: 8, start_sector: 256 };
    assert_eq!(Descriptor::decode(&bytes), write);
}

#[test]
fn places() {
    assert_eq!((descriptors_offset(0), descriptors_offset(3)), (0, 3 * 98304));
    assert_eq!(
        (descriptors_bytes(1, 4096), descriptors_bytes(128, 4096), descriptors_bytes(171, 4096)),
        (4096, 4096, 8192)
    );
    assert_eq!(data_position(0, 0), 0x8000_0000);
    assert_eq!(data_position(2, 5), 0x8000_0000 + (2 << 41) + (5 << 25));
}
