/* Stands in for libcurl, which tpm2-tools' one binary links for `tpm2 getekcertificate` alone: 10 MB less of initramfs. */
#define STUB(name) void *name(void) { return 0; }
STUB(curl_easy_cleanup)
STUB(curl_easy_escape)
STUB(curl_easy_init)
STUB(curl_easy_perform)
STUB(curl_easy_setopt)
STUB(curl_easy_strerror)
STUB(curl_easy_unescape)
STUB(curl_free)
STUB(curl_global_cleanup)
STUB(curl_global_init)
