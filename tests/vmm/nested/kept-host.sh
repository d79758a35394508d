# Inside the machine: a guest on a disk of the pool is saved while it runs, twice, killed, and goes on: where it was, and beside
# that as another machine on a clone of its disk.
set -e
export AFTERIMAGE_POOL=/mnt/pool
log() { cat /mnt/pool/vms/$1/console.log /mnt/pool/vms/$1/vmm.log; }
wait_for() {
    tries=0
    until grep -q "$2" /mnt/pool/vms/$1/console.log 2> /dev/null; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] || { log $1; cat /mnt/pool/server.log; echo "host: in vain: $1 $2"; exit 1; }
        sleep 0.2
    done
}
mount -t ext4 /dev/vda /mnt
afterimage -q mount --init --daemon /srv
truncate -s 64M /srv/disks/root.raw
/bin/mke2fs -q -F -t ext4 /srv/disks/root.raw
afterimage vm run web --kernel /vmlinuz --initrd /guest.gz --disk root --memory 256M --cpus 2 \
    --cmdline "console=ttyS0 panic=-1 quiet" --detach
wait_for web "guest: begun"
wait_for web "count 20"
afterimage --json vm checkpoint web --as full || { log web; exit 1; }
sleep 3
afterimage --json vm checkpoint web --as more --incremental || { log web; exit 1; }
sleep 3
afterimage vm stop web --force || { log web; exit 1; }
afterimage checkpoint ls
afterimage vm restore web@full --as twin --detach
afterimage vm restore web@more --detach
for name in twin web; do
    wait_for $name "count"
    sleep 3
    echo "end" | timeout 5 afterimage vm console $name > /dev/null || true
    wait_for $name "guest: off"
    echo "host: $name"
    log $name
done
sleep 2
afterimage vm ls
for disk in root twin-root; do
    e2fsck -fn /srv/disks/$disk.raw && echo "host: $disk is clean"
done
afterimage checkpoint verify web@more
afterimage umount /srv
afterimage check && echo "host: the pool is sound"
