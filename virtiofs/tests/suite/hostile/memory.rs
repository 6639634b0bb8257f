//! Memory that a hypervisor gives and takes.

use super::*;

#[test]
fn vu3_memory_tables() {
    let (_fixture, mut program) = start();
    let guest = Guest::new();
    let good = guest.region();
    let pipe = std::io::pipe().unwrap();
    let short = tempfile::tempfile().unwrap();
    short.set_len(4096).unwrap();
    let second = VhostUserMemoryRegionInfo { guest_phys_addr: MEMORY as u64 - 4096, ..good };
    for (what, regions) in [
        ("size 0", vec![VhostUserMemoryRegionInfo { memory_size: 0, ..good }]),
        ("overflow", vec![VhostUserMemoryRegionInfo { guest_phys_addr: u64::MAX - 4096, ..good }]),
        ("user overflow", vec![VhostUserMemoryRegionInfo { userspace_addr: u64::MAX - 4096, ..good }]),
        ("overlap", vec![good, second]),
        ("unaligned offset", vec![VhostUserMemoryRegionInfo { mmap_offset: 7, memory_size: 4096, ..good }]),
        ("beyond the file", vec![VhostUserMemoryRegionInfo { mmap_offset: 4096, ..good }]),
        ("offset overflow", vec![VhostUserMemoryRegionInfo { mmap_offset: u64::MAX - 4095, ..good }]),
        ("short file", vec![VhostUserMemoryRegionInfo { mmap_handle: short.as_raw_fd(), ..good }]),
        ("pipe", vec![VhostUserMemoryRegionInfo { mmap_handle: pipe.0.as_raw_fd(), ..good }]),
        ("null", vec![VhostUserMemoryRegionInfo { mmap_handle: null().as_raw_fd(), ..good }]),
    ] {
        let connection = Connection::bare(&program.socket, &guest);
        assert!(connection.vhost.set_mem_table(&regions).is_err(), "{what}");
        assert!(program.is_running(), "{what}");
    }
    serves(&program);
}

#[test]
fn vu3_memory_tables_that_do_not_add_up() {
    let (_fixture, mut program) = start();
    serves(&program);
    let before = program.descriptors_at_rest();
    let guest = Guest::new();
    let file = guest.region().mmap_handle;
    let region = |number: u64| VhostUserMemoryRegionInfo {
        guest_phys_addr: number << 20,
        memory_size: 4096,
        userspace_addr: number << 20,
        ..guest.region()
    };
    let regions: Vec<_> = (0..40).map(region).collect();
    let socket = program.socket.clone();
    let answered = |count: usize, told: usize, fds: usize| {
        let connection = Connection::bare(&socket, &guest);
        taken(&connection, 5, &table(count as u32, &regions[..told]), &vec![file; fds])
    };
    for good in [1, 2, 31, 32] {
        assert!(answered(good, good, good), "{good}");
    }
    for (count, told, fds) in [
        (0, 0, 0),
        (0, 0, 1),
        (0, 1, 1),
        (33, 33, 32),
        (33, 33, 33),
        (33, 32, 32),
        (1, 1, 0),
        (2, 2, 1),
        (2, 2, 3),
        (1, 1, 32),
        (1, 1, 100),
        (2, 1, 2),
        (1, 2, 1),
        (u32::MAX as usize, 1, 1),
    ] {
        assert!(!answered(count, told, fds), "{count} regions, {told} told, {fds} descriptors");
        assert!(program.is_running());
    }
    wait_for("descriptors to be closed", || program.descriptors() == before);
    assert_eq!(program.guest_mappings(), 0);
    serves(&program);
}

/// It costs that VM its backend, and no other VM anything.
#[test]
fn vu3_memory_that_is_taken_away_later() {
    let (_other_fixture, other, mut other_guest, other_connection) = connected();
    for map_first in [false, true] {
        let (_fixture, mut program, mut guest, connection) = connected();
        if map_first {
            // From then on there is a handler, which must leave this alone.
            let node = lookup(&connection, &mut guest, &tree("big"));
            for _ in 0..20 {
                read(&connection, &mut guest, node, 0, 1 << 20).unwrap();
            }
        }
        getattr(&guest, REQUEST);
        guest.offer(REQUEST, 0);
        let file = guest.memory.iter().next().unwrap().file_offset().unwrap().file().try_clone().unwrap();
        file.set_len(0).unwrap();
        connection.kick(REQUEST);
        wait_for("the program to end", || !program.is_running());
        let (status, lines) = program.ended();
        assert_eq!(status.signal(), Some(nix::libc::SIGBUS), "{lines:#?}");
        assert!(lines.len() <= 6, "{lines:#?}");
        check(&other_connection, &mut other_guest);
    }
    drop(other_connection);
    serves(&other);
}

#[test]
fn vu4_memory_regions_added_and_removed() {
    let (_fixture, program, guest, mut connection) = connected();
    let region = guest.region();
    let unknown = VhostUserMemoryRegionInfo { guest_phys_addr: 1 << 40, ..region };
    assert!(connection.vhost.remove_mem_region(&unknown).is_err());
    for wrong in [
        VhostUserMemoryRegionInfo { memory_size: 4096, ..region },
        VhostUserMemoryRegionInfo { guest_phys_addr: 4096, ..region },
    ] {
        let mut connection = Connection::bare(&program.socket, &guest);
        assert!(connection.vhost.remove_mem_region(&wrong).is_err());
        let mut connection = Connection::bare(&program.socket, &guest);
        assert!(connection.vhost.add_mem_region(&wrong).is_err(), "it overlaps");
    }
    // Without a descriptor, and with two.
    for fds in [vec![], vec![region.mmap_handle; 2]] {
        let connection = Connection::bare(&program.socket, &guest);
        let body = le64(&[0, 1 << 30, 4096, 1 << 30, 0]);
        assert!(!taken(&connection, 37, &body, &fds), "{}", fds.len());
    }
    serves(&program);
}

#[test]
fn vu4_more_memory_regions_than_there_are_slots() {
    let (_fixture, program) = start();
    serves(&program);
    let before = program.descriptors_at_rest();
    let guest = Guest::new();
    let mut connection = Connection::bare(&program.socket, &guest);
    let slots = connection.vhost.get_max_mem_slots().unwrap();
    let region = |number: u64| VhostUserMemoryRegionInfo {
        guest_phys_addr: (1 << 40) + (number << 20),
        memory_size: 4096,
        userspace_addr: (1 << 40) + (number << 20),
        ..guest.region()
    };
    for number in 1..slots {
        connection.vhost.add_mem_region(&region(number)).unwrap_or_else(|e| panic!("{number}: {e}"));
    }
    // One makes room for another.
    connection.vhost.remove_mem_region(&region(7)).unwrap();
    connection.vhost.add_mem_region(&region(slots)).unwrap();
    assert!(connection.vhost.add_mem_region(&region(slots + 1)).is_err());
    drop(connection);
    wait_for("descriptors to be closed", || program.descriptors() == before);
    assert_eq!(program.guest_mappings(), 0);
    serves(&program);
}

#[test]
fn vu4_the_region_of_a_live_ring_is_removed() {
    let (_fixture, program, mut guest, mut connection) = connected();
    connection.vhost.remove_mem_region(&guest.region()).unwrap();
    getattr(&guest, REQUEST);
    guest.offer(REQUEST, 0);
    let published = guest.used_index(REQUEST);
    connection.kick(REQUEST);
    // The other queue too, if it has not run yet.
    wait_for("the queue to be given up", || program.stat("lair_virtiofs_broken_queues_total") > 0);
    assert_eq!(guest.used_index(REQUEST), published);
    // The memory comes back, and the ring is set up anew.
    connection.vhost.add_mem_region(&guest.region()).unwrap();
    connection.vhost.get_vring_base(REQUEST).unwrap();
    connection.set_up(&guest, REQUEST, 0);
    wait_for("the reply", || guest.used_index(REQUEST) == guest.offered(REQUEST));
    guest.take_used(REQUEST);
    check(&connection, &mut guest);
}
