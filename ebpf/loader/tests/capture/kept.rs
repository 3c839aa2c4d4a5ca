//! What is kept outlives the process, is root's alone, and leaves no trace.

use std::os::unix::fs::PermissionsExt as _;

use mesh_ebpf::KeptRecords;

use crate::lab::Lab;

type Records = KeptRecords<4096>;

#[test]
fn records_outlive_their_process_and_are_wiped() {
    let lab = Lab::new();
    let bpffs = lab.bpffs.join("culvert");
    Records::remove(&bpffs).unwrap();
    std::fs::create_dir(&bpffs).unwrap();
    let mut record = [0xff; 4096];
    {
        let records = Records::open(&bpffs, 256).unwrap();
        assert_eq!(records.count(), 256);
        records.read(255, &mut record).unwrap();
        assert_eq!(record, [0; 4096]);
        records.write(255, &[7; 4096]).unwrap();
        records.write(0, &[8; 4096]).unwrap();
        assert!(records.write(256, &record).is_err());
        assert!(records.read(256, &mut record).is_err());
    }
    let pin = bpffs.join("kept-v1");
    let mode = std::fs::metadata(&pin).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let records = Records::open(&bpffs, 256).unwrap();
    records.read(255, &mut record).unwrap();
    assert_eq!(record, [7; 4096]);
    records.read(0, &mut record).unwrap();
    assert_eq!(record, [8; 4096]);

    // One of another shape or layout makes room, and is wiped for whoever still holds it.
    std::fs::rename(&pin, bpffs.join("kept-v999")).unwrap();
    let fresh = Records::open(&bpffs, 256).unwrap();
    records.read(255, &mut record).unwrap();
    assert_eq!(record, [0; 4096]);
    fresh.write(3, &[9; 4096]).unwrap();
    let wider = Records::open(&bpffs, 512).unwrap();
    fresh.read(3, &mut record).unwrap();
    assert_eq!(record, [0; 4096]);

    wider.write(511, &[5; 4096]).unwrap();
    Records::remove(&bpffs).unwrap();
    wider.read(511, &mut record).unwrap();
    assert_eq!(record, [0; 4096]);
    assert_eq!(std::fs::read_dir(&bpffs).unwrap().count(), 0);
}
