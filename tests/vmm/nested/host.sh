# Inside the machine: a pool, a guest on one of its disks, and what becomes of it. Each line that begins with "host:" is
# looked for by the test; whatever fails ends it.
set -e
export AFTERIMAGE_POOL=/mnt/pool
log() { cat /mnt/pool/vms/web/console.log; }
wait_for() {
    tries=0
    until grep -q "$1" /mnt/pool/vms/web/console.log 2> /dev/null; do
        tries=$((tries + 1))
        [ $tries -lt 1200 ] || { log; cat /mnt/pool/vms/web/vmm.log; echo "host: in vain: $1"; exit 1; }
        sleep 0.2
    done
}
mount -t ext4 /dev/vda /mnt
afterimage -q mount --init --daemon /srv
truncate -s 64M /srv/disks/root.raw
/bin/mke2fs -q -F -t ext4 /srv/disks/root.raw
afterimage vm run web --kernel /vmlinuz --initrd /guest.gz --disk root,serial=web-root \
    --memory 256M --cpus 2 --cmdline "console=ttyS0 panic=-1 quiet" --detach
afterimage vm ls
! afterimage vm start web 2> /dev/null
wait_for "guest: reboots"
wait_for "guest: synced"
wait_for "guest: fsynced 5"
# It writes on meanwhile; what it has said by now was durable before.
fsynced=$(log | sed -n 's/.*guest: fsynced \([0-9]*\).*/\1/p' | tail -1)
afterimage -q snapshot root@one
afterimage vm pause web
afterimage vm resume web
sleep 1
echo "hello" | timeout 5 afterimage vm console web > /tmp/console || true
wait_for "guest: heard hello"
wait_for "guest: waits"
afterimage vm stop web --patience 900
wait_for "guest: off"
[ ! -e /mnt/pool/vms/web/api.sock ]
log
cat /mnt/pool/vms/web/vmm.log
afterimage vm info web
mkdir -p /tmp/one /tmp/now
# Nobody unmounted what is in the snapshot, so its journal is replayed, in a clone.
afterimage -q clone root@one copy
mount -o loop /srv/disks/copy.raw /tmp/one
cat /tmp/one/first /tmp/one/second
[ ! -e /tmp/one/third ]
[ "$(md5sum < /tmp/one/large)" = "$(cat /tmp/one/sum)" ] && echo "host: the snapshot is whole"
there=$(tail -1 /tmp/one/counts)
[ "$there" -ge "$fsynced" ] && [ "$(cat /tmp/one/counts)" = "$(seq 1 "$there")" ] && echo "host: what was synced is in the snapshot"
umount /tmp/one
afterimage -q rm copy
mount -o loop /srv/disks/root.raw /tmp/now
cat /tmp/now/third
umount /tmp/now
afterimage vm rm web
afterimage umount /srv
afterimage check && echo "host: the pool is sound"
