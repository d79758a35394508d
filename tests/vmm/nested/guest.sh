#!/bin/busybox sh
# The first process of the guest: an ordinary Debian kernel, its disk a disk of the pool.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for pass in 1 2 3 4 5; do
    for module in /modules/*.ko; do
        insmod "$module" 2> /dev/null && rm "$module"
    done
done
until [ -b /dev/vda ]; do sleep 0.2; done
mount -t ext4 /dev/vda /mnt || { echo "guest: no root"; poweroff -f; }
if [ ! -e /mnt/first ]; then
    echo "written before the reboot" > /mnt/first
    umount /mnt
    echo "guest: reboots"
    reboot -f
fi
echo "guest: serial $(cat /sys/block/vda/serial) processors $(nproc)"
echo "guest: memory $(($(sed -n 's/MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo) / 1024 > 180))"
dd if=/dev/hwrng of=/mnt/random bs=512 count=1 2> /dev/null
[ "$(wc -c < /mnt/random)" = 512 ] && echo "guest: random"
echo "written before the snapshot" > /mnt/second
dd if=/dev/urandom of=/mnt/large bs=1M count=4 conv=fsync 2> /dev/null
md5sum < /mnt/large > /mnt/sum
sync
echo "guest: synced"
# Durable one by one while the host takes a snapshot.
while [ ! -e /enough ]; do
    n=$((n + 1))
    echo "$n" | dd of=/mnt/counts oflag=append conv=notrunc,fsync 2> /dev/null && echo "guest: fsynced $n"
    sleep 0.2
done &
read line
echo "guest: heard $line"
touch /enough
wait
echo "written after the snapshot" > /mnt/third
sync
fstrim /mnt
echo "guest: waits"
# 24 bytes are an event: somebody pressed the power button.
dd if=/dev/input/event0 of=/dev/null bs=24 count=1 2> /dev/null
umount /mnt
echo "guest: off"
poweroff -f
