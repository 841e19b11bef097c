# What tpm2-tools do with a TPM, a part of everything: it must not notice what happens to the TPM between two commands.
# Run by test_hibernation_suites.py in an empty directory, with bash -e.
tpm2_startup -c
tpm2_pcrextend 16:sha256=2222222222222222222222222222222222222222222222222222222222222222
# Keys: an object context that is saved and loaded, signatures, HMAC, encryption.
tpm2_createprimary -Q -C o -G ecc -c primary.ctx
tpm2_flushcontext -t
tpm2_create -Q -C primary.ctx -G ecc:ecdsa -p keyauth -u sign.pub -r sign.priv
tpm2_flushcontext -t
tpm2_load -Q -C primary.ctx -u sign.pub -r sign.priv -c sign.ctx
tpm2_flushcontext -t
echo message >message
tpm2_sign -Q -c sign.ctx -p keyauth -g sha256 -o signature message
tpm2_verifysignature -Q -c sign.ctx -g sha256 -m message -s signature
tpm2_flushcontext -t
tpm2_create -Q -C primary.ctx -G hmac -c hmac.ctx
tpm2_flushcontext -t
tpm2_hmac -c hmac.ctx -o hmac.1 message
tpm2_hmac -c hmac.ctx -o hmac.2 message
cmp hmac.1 hmac.2
tpm2_flushcontext -t
tpm2_create -Q -C primary.ctx -G aes128cfb -c aes.ctx
tpm2_flushcontext -t
tpm2_encryptdecrypt -Q -c aes.ctx -o secret message
tpm2_encryptdecrypt -Q -d -c aes.ctx -o clear secret
cmp clear message
tpm2_flushcontext -t
# A decryption scheme that has no hash, named once by the key and once by the command.
tpm2_create -Q -C primary.ctx -G rsa2048:rsaes -a "sensitivedataorigin|userwithauth|decrypt" -c rsa.ctx
tpm2_flushcontext -t
tpm2_rsaencrypt -Q -c rsa.ctx -s rsaes -o secret message
tpm2_rsadecrypt -c rsa.ctx -s rsaes secret | cmp - message
tpm2_flushcontext -t
# Changed auth, a persistent key, and what it signs.
tpm2_load -Q -C primary.ctx -u sign.pub -r sign.priv -c sign.ctx
tpm2_flushcontext -t
tpm2_changeauth -Q -c sign.ctx -C primary.ctx -p keyauth -r sign2.priv other
tpm2_flushcontext -t
tpm2_load -Q -C primary.ctx -u sign.pub -r sign2.priv -c sign2.ctx
tpm2_flushcontext -t
tpm2_evictcontrol -Q -C o -c sign2.ctx 0x81000010
tpm2_sign -Q -c 0x81000010 -p other -g sha256 -o signature2 message
! tpm2_sign -Q -c 0x81000010 -p keyauth -g sha256 -o signature3 message 2>/dev/null
tpm2_dictionarylockout -c
# Quote and certify.
tpm2_createek -Q -c ek.ctx -G ecc -u ek.pub
tpm2_flushcontext -t
tpm2_createak -Q -C ek.ctx -c ak.ctx -G ecc -g sha256 -s ecdsa -u ak.pub -n ak.name
tpm2_flushcontext -t
tpm2_quote -Q -c ak.ctx -l sha256:0,16 -q 0102 -m quote -s quote.sig -o quote.pcrs -g sha256
tpm2_checkquote -Q -u ak.pub -m quote -s quote.sig -f quote.pcrs -g sha256 -q 0102
tpm2_flushcontext -t
tpm2_certify -Q -c 0x81000010 -C ak.ctx -P other -g sha256 -o certify -s certify.sig
tpm2_flushcontext -t
# Credential activation: a policy session on the endorsement hierarchy.
echo credential >credential
tpm2_makecredential -Q -e ek.pub -s credential -n "$(xxd -p -c 100 ak.name)" -o blob
tpm2_startauthsession --policy-session -S policy.dat
tpm2_policysecret -Q -S policy.dat -c e
tpm2_activatecredential -Q -c ak.ctx -C ek.ctx -i blob -o activated -P session:policy.dat
cmp activated credential
tpm2_flushcontext policy.dat
tpm2_flushcontext -t
# NV: written, extended, counted, locked; a PIN; a policy that reads NV.
tpm2_nvdefine -Q 0x1500010 -C o -s 16 -a "ownerread|ownerwrite|authread|authwrite|read_stclear|write_stclear" -p nvauth
printf 0123456789abcdef | tpm2_nvwrite -Q 0x1500010 -C 0x1500010 -P nvauth -i -
test "$(tpm2_nvread 0x1500010 -C 0x1500010 -P nvauth -s 16)" = 0123456789abcdef
tpm2_nvwritelock -Q 0x1500010 -C o
! printf x | tpm2_nvwrite -Q 0x1500010 -C o -i - 2>/dev/null
tpm2_nvreadlock -Q 0x1500010 -C o
! tpm2_nvread 0x1500010 -C o -s 1 2>/dev/null
tpm2_nvdefine -Q 0x1500011 -C o -a "ownerread|ownerwrite|nt=counter"
for i in 1 2 3; do tpm2_nvincrement -Q 0x1500011 -C o; done
tpm2_nvread 0x1500011 -C o >counter.1
tpm2_nvincrement -Q 0x1500011 -C o
tpm2_nvread 0x1500011 -C o >counter.2
! cmp -s counter.1 counter.2
tpm2_nvdefine -Q 0x1500012 -C o -g sha256 -a "ownerread|ownerwrite|nt=extend"
printf a | tpm2_nvextend -Q 0x1500012 -C o -i -
tpm2_nvdefine -Q 0x1500013 -C o -a "ownerread|ownerwrite|nt=bits"
tpm2_nvsetbits -Q 0x1500013 -C o -i 0xbadc0de
tpm2_nvread 0x1500013 -C o | xxd -p | grep -q 0badc0de
# A salted, bound HMAC session that audits what it authorises, and parameter encryption.
tpm2_startauthsession --hmac-session -c primary.ctx -S hmac.dat
tpm2_flushcontext -t
tpm2_sessionconfig -Q hmac.dat --enable-decrypt --enable-encrypt
tpm2_create -Q -C primary.ctx -P session:hmac.dat -u sealed.pub -r sealed.priv -i message
tpm2_flushcontext hmac.dat
tpm2_flushcontext -t
tpm2_startauthsession --audit-session -S audit.dat
tpm2_getrandom -S audit.dat --cphash cp.hash --rphash rp.hash 8 >/dev/null
tpm2_sessionconfig audit.dat
tpm2_flushcontext audit.dat
tpm2_flushcontext -t
# A policy of many parts, in a trial and for real.
policy() {
  tpm2_policypcr -Q -S "$1" -l sha256:16
  tpm2_policycommandcode -Q -S "$1" TPM2_CC_Unseal
  tpm2_policyauthvalue -Q -S "$1" -L "$2"
}
tpm2_startauthsession -S trial.dat
policy trial.dat many.policy
tpm2_flushcontext trial.dat
tpm2_create -Q -C primary.ctx -L many.policy -p sealauth -i message -u many.pub -r many.priv
tpm2_flushcontext -t
tpm2_load -Q -C primary.ctx -u many.pub -r many.priv -c many.ctx
tpm2_flushcontext -t
tpm2_startauthsession --policy-session -S real.dat
policy real.dat again.policy
cmp many.policy again.policy
tpm2_unseal -c many.ctx -p session:real.dat+sealauth | cmp - message
tpm2_flushcontext real.dat
tpm2_flushcontext -t
# Duplication to another parent and back in.
tpm2_startauthsession -S trial.dat
tpm2_policycommandcode -Q -S trial.dat -L dup.policy TPM2_CC_Duplicate
tpm2_flushcontext trial.dat
tpm2_createprimary -Q -C o -G rsa -g sha256 -c parent2.ctx
tpm2_flushcontext -t
tpm2_readpublic -Q -c parent2.ctx -o parent2.pub
tpm2_flushcontext -t
tpm2_create -Q -C primary.ctx -G ecc -L dup.policy -a "sensitivedataorigin|userwithauth|sign" -u dup.pub -r dup.priv
tpm2_flushcontext -t
tpm2_load -Q -C primary.ctx -u dup.pub -r dup.priv -c dup.ctx
tpm2_flushcontext -t
tpm2_loadexternal -Q -C n -u parent2.pub -c external.ctx
tpm2_flushcontext -t
tpm2_startauthsession --policy-session -S dup.dat
tpm2_policycommandcode -Q -S dup.dat TPM2_CC_Duplicate
tpm2_duplicate -Q -C external.ctx -c dup.ctx -G null -p session:dup.dat -r dup.out -s dup.seed
tpm2_flushcontext dup.dat
tpm2_flushcontext -t
tpm2_import -Q -C parent2.ctx -u dup.pub -i dup.out -r dup.in -s dup.seed
tpm2_flushcontext -t
tpm2_load -Q -C parent2.ctx -u dup.pub -r dup.in -c dup2.ctx
tpm2_flushcontext -t
# Time, clock, reset and restart counters are those of one and the same start.
tpm2_readclock >clock.1
tpm2_readclock >clock.2
for line in reset_count restart_count; do
  test "$(grep "$line" clock.1)" = "$(grep "$line" clock.2)"
done
tpm2_shutdown -c
