/* What libtpms.py uses of libtpms (<libtpms/tpm_library.h> and its neighbours); ./script/abi makes libtpms_abi.py of it. */
typedef uint32_t TPM_RESULT;
struct libtpms_callbacks {
    int sizeOfStruct;
    TPM_RESULT (*tpm_nvram_init)(void);
    TPM_RESULT (*tpm_nvram_loaddata)(unsigned char **data, uint32_t *length, uint32_t tpm_number, const char *name);
    TPM_RESULT (*tpm_nvram_storedata)(const unsigned char *data, uint32_t length, uint32_t tpm_number, const char *name);
    TPM_RESULT (*tpm_nvram_deletename)(uint32_t tpm_number, const char *name, unsigned char mustExist);
    TPM_RESULT (*tpm_io_init)(void);
    TPM_RESULT (*tpm_io_getlocality)(uint32_t *localityModifer, uint32_t tpm_number);
    TPM_RESULT (*tpm_io_getphysicalpresence)(unsigned char *physicalPresence, uint32_t tpm_number);
};
uint32_t TPMLIB_GetVersion(void);
TPM_RESULT TPMLIB_ChooseTPMVersion(int ver);
TPM_RESULT TPMLIB_RegisterCallbacks(struct libtpms_callbacks *);
TPM_RESULT TPMLIB_MainInit(void);
void TPMLIB_Terminate(void);
TPM_RESULT TPMLIB_Process(unsigned char **respbuffer, uint32_t *resp_size, uint32_t *respbufsize,
                          unsigned char *command, uint32_t command_size);
TPM_RESULT TPMLIB_VolatileAll_Store(unsigned char **buffer, uint32_t *buflen);
TPM_RESULT TPMLIB_SetState(int st, const unsigned char *buffer, uint32_t buflen);
uint32_t TPMLIB_SetBufferSize(uint32_t wanted_size, uint32_t *min_size, uint32_t *max_size);
char *TPMLIB_GetInfo(int flags);
TPM_RESULT TPM_IO_Hash_Start(void);
TPM_RESULT TPM_IO_Hash_Data(const unsigned char *data, uint32_t data_length);
TPM_RESULT TPM_IO_Hash_End(void);
TPM_RESULT TPM_IO_TpmEstablished_Get(unsigned char *tpmEstablished);
TPM_RESULT TPM_IO_TpmEstablished_Reset(void);
void *malloc(size_t size);
void free(void *ptr);
int OPENSSL_init_crypto(uint64_t opts, const void *settings);
void TPM_Free(unsigned char *buffer);
