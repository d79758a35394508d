//! The parts of imports that need no image.

use super::vmdk::{Extent, belongs, parse};
use super::{check_disk_name, interim_name};

#[test]
fn interim_names_are_good_and_differ() {
    for name in ["a", "vm.", "with space", &"\u{e4}".repeat(64)] {
        let interim = interim_name(name);
        check_disk_name(&interim).unwrap();
        assert_ne!(interim, interim_name(name));
    }
}

#[test]
fn only_files_of_the_image_belong_to_it() {
    for good in ["d-s001.vmdk", "d-f0012.vmdk", "d-flat.vmdk"] {
        assert!(belongs("d", good), "{good}");
    }
    for bad in
        ["/etc/shadow", "d-s1.vmdk", "d-../x-flat.vmdk", "d-2-flat.vmdk", "e-flat.vmdk", "d-flat.raw", "json:{}", ""]
    {
        assert!(!belongs("d", bad), "{bad}");
    }
    assert!(!belongs("", "-flat.vmdk"));
}

#[test]
fn extent_lines_are_parsed_whole() {
    let text = "# Disk DescriptorFile\nRW 8 SPARSE \"d-s001.vmdk\"\r\nRDONLY 16 FLAT \"d-f001.vmdk\" 3\n";
    let want = [
        Extent { sectors: 8, flat: false, name: "d-s001.vmdk", offset: 0 },
        Extent { sectors: 16, flat: true, name: "d-f001.vmdk", offset: 3 },
    ];
    assert_eq!(parse(text).unwrap(), want);
    for bad in ["RW x FLAT \"a\" 0", "RW 8 FLAT", "RW 8 ZERO", "RW 8 FLAT \"a", "NOACCESS 8 FLAT \"a\" 0", "nothing"] {
        assert!(parse(bad).is_err(), "{bad}");
    }
}
