# Inside the machine: a guest is begun, stopped, and goes on twice in other processes; then it ends by itself. The words are
# the name of the test, which is run here for each part of that.
set -e
mount -t ext4 /dev/vda /mnt
truncate -s 64M /mnt/root.raw
/bin/mke2fs -q -F -t ext4 /mnt/root.raw
for part in begin go-on go-on end; do
    AFTERIMAGE_TEST_PART=$part /bin/tests --exact vmm::moved::a_debian_kernel_goes_on_in_another_process --nocapture
    # The guest is to notice that time went by.
    sleep 12
done
e2fsck -fn /mnt/root.raw && echo "host: the disk is clean"
