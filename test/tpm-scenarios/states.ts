import { concat, empty, sized, u16, u32, u64 } from '@fleetkey/tpm2/bytes.ts'
import { alg, command, handle as known } from '@fleetkey/tpm2/constants.ts'
import { marshalPcrSelection } from '@fleetkey/tpm2/structures.ts'
import { password } from '../tpm-script.ts'
import { bits, createPrimary, ecc, ecdsa, flush, own, owner, sealed, signing, storage, type Recorder, type Scenario } from './recorder.ts'

const digestsOf = (...of: readonly (readonly [number, Uint8Array])[]): Uint8Array =>
  concat(u32(of.length), ...of.map(([hash, digest]) => concat(u16(hash), digest)))
const one = new Uint8Array(32).fill(1)

const readPcrs = async (on: Recorder, label: string, selection: Uint8Array): Promise<void> =>
  void (await on.step({ label, see: (reader) => reader.rest() }, { code: command.pcrRead, parameters: selection }))
const bank = (...pcrs: readonly number[]): Uint8Array => marshalPcrSelection([{ hash: alg.sha256, pcrs }])
const everything = async (on: Recorder, label: string): Promise<void> => {
  for (const first of [0, 8, 16]) await readPcrs(on, `${label}: PCR ${first}`, bank(...Array.from({ length: 8 }, (_, at) => first + at)))
}

/** PCRs: banks, localities, events. */
export const pcrs: Scenario = async (on) => {
  await everything(on, 'start')
  await readPcrs(on, 'more than eight', bank(0, 1, 2, 3, 4, 5, 6, 7, 8, 9))
  await readPcrs(on, 'none', u32(0))
  await readPcrs(on, 'five banks', concat(u32(5), ...Array.from({ length: 5 }, () => bank(0).subarray(4))))
  await readPcrs(on, 'another bank', marshalPcrSelection([{ hash: alg.sha1, pcrs: [0, 1] }]))
  await readPcrs(
    on,
    'two banks',
    marshalPcrSelection([
      { hash: alg.sha256, pcrs: [0, 1, 2, 3, 4, 5, 6] },
      { hash: alg.sha256, pcrs: [1, 2, 3] },
    ]),
  )
  const extend = async (label: string, pcr: number, values: Uint8Array): Promise<void> =>
    void (await on.step(label, { code: command.pcrExtend, handles: [pcr], auth: [password()], parameters: values }))
  for (const pcr of [0, 7, 15, 16, 17, 20, 22, 23, 24, known.null]) await extend(`extend ${pcr}`, pcr, digestsOf([alg.sha256, one]))
  await extend('another bank', 1, digestsOf([alg.sha1, new Uint8Array(20)]))
  await extend('two digests', 1, digestsOf([alg.sha1, new Uint8Array(20)], [alg.sha256, one]))
  await extend('the same twice', 1, digestsOf([alg.sha256, one], [alg.sha256, one]))
  await extend('no digests', 1, u32(0))
  await extend('five digests', 1, u32(5))
  await extend('no such hash', 1, digestsOf([0x99, one]))
  await extend('short digest', 1, digestsOf([alg.sha256, one.subarray(1)]))
  await on.step('without authorisation', { code: command.pcrExtend, handles: [1], parameters: digestsOf([alg.sha256, one]) })
  await on.step('by a wrong password', { code: command.pcrExtend, handles: [1], auth: [password(Uint8Array.of(1))], parameters: digestsOf([alg.sha256, one]) })
  const event = async (label: string, pcr: number, data: Uint8Array): Promise<void> =>
    void (await on.step({ label, see: (reader) => reader.rest() }, { code: command.pcrEvent, handles: [pcr], auth: [password()], parameters: sized(data) }))
  await event('event', 2, new TextEncoder().encode('event'))
  await event('event of nothing', 2, empty)
  await event('event for nobody', known.null, one)
  await event('event of 1024 bytes', 2, new Uint8Array(1024))
  await event('event of 1025 bytes', 2, new Uint8Array(1025))
  const reset = async (label: string, pcr: number): Promise<void> => void (await on.step(label, { code: command.pcrReset, handles: [pcr], auth: [password()] }))
  for (const pcr of [0, 16, 17, 20, 23, 24]) await reset(`reset ${pcr}`, pcr)
  for (const locality of [1, 2, 3, 4]) {
    await on.subject.setLocality(locality)
    for (const pcr of [16, 17, 18, 19, 20, 21]) {
      await extend(`locality ${locality}: extend ${pcr}`, pcr, digestsOf([alg.sha256, one]))
      await reset(`locality ${locality}: reset ${pcr}`, pcr)
    }
  }
  await on.subject.setLocality(0)
  await everything(on, 'end')
}

const clock = async (on: Recorder, label: string): Promise<void> =>
  void (await on.step(
    { label, see: (reader) => (reader.bytes(16), { resetCount: reader.u32(), restartCount: reader.u32(), safe: reader.u8() }) },
    { code: command.readClock },
  ))
const startup = async (on: Recorder, label: string, type: number): Promise<void> =>
  void (await on.step(label, { code: command.startup, parameters: u16(type) }))
const shutdown = async (on: Recorder, label: string, type: number): Promise<void> =>
  void (await on.step(label, { code: command.shutdown, parameters: u16(type) }))

/** Starts: reset, restart, resume, unclean, at other localities. */
export const starts: Scenario = async (on) => {
  const { subject } = on
  const start = async (label: string, type: number): Promise<void> => {
    await subject.init()
    await on.step(`${label}: before the start`, { code: command.getRandom, parameters: u16(4) })
    await startup(on, label, type)
    await clock(on, `${label}: clock`)
    await readPcrs(on, `${label}: PCRs`, bank(0, 1, 16, 17))
  }
  await clock(on, 'clock')
  await on.step('extend', { code: command.pcrExtend, handles: [1], auth: [password()], parameters: digestsOf([alg.sha256, one]) })
  await shutdown(on, 'no such shutdown', 7)
  await shutdown(on, 'shutdown to resume', 1)
  await start('resume', 1)
  await shutdown(on, 'shutdown to resume again', 1)
  await start('restart', 0)
  await shutdown(on, 'shutdown', 0)
  await start('resume what was cleared', 1)
  await start('reset', 0)
  await start('unclean', 0)
  await startup(on, 'again', 0)
  await startup(on, 'no such start', 5)
  await shutdown(on, 'shutdown and go on', 1)
  await on.step('extend after it', { code: command.pcrExtend, handles: [1], auth: [password()], parameters: digestsOf([alg.sha256, one]) })
  await start('resume after a change', 1)
  await start('reset after a change', 0)
  for (const locality of [3, 1]) {
    await shutdown(on, 'shutdown', 0)
    await subject.init()
    await subject.setLocality(locality)
    await startup(on, `start at locality ${locality}`, 0)
    await subject.setLocality(0)
    await readPcrs(on, `PCR 0 after locality ${locality}`, bank(0, 1))
  }
  await startup(on, 'start after a refusal', 0)
  const set = async (label: string, by: number, to: bigint): Promise<void> =>
    void (await on.step(label, { code: command.clockSet, handles: [by], auth: [password()], parameters: u64(to) }))
  await set('clock forward', owner, 100_000_000n)
  await set('clock back', owner, 5n)
  await set('clock too far', owner, 0xffff_ffff_ffff_0000n)
  await set('clock by the lockout hierarchy', known.lockout, 200_000_000n)
}

const properties = async (on: Recorder, label: string): Promise<void> => {
  // Permanent attributes, then lockout counter, most tries, interval, recovery.
  for (const [first, count] of [
    [0x200, 1],
    [0x202, 3],
    [0x207, 1],
    [0x20e, 4],
  ] as const)
    await on.step(
      { label: `${label}: property ${first.toString(16)}`, see: (reader) => reader.rest() },
      { code: command.getCapability, parameters: concat(u32(6), u32(first), u32(count)) },
    )
}

/** Authorisation values of hierarchies, dictionary attacks, TPM2_Clear. */
export const hierarchies: Scenario = async (on) => {
  const { tpm } = on.subject
  const secret = new TextEncoder().encode('secret')
  const change = async (label: string, hierarchy: number, value: Uint8Array, auth: Uint8Array = empty): Promise<void> =>
    void (await on.step(label, { code: command.hierarchyChangeAuth, handles: [hierarchy], auth: [password(auth)], parameters: sized(value) }))
  for (const hierarchy of [owner, known.endorsement, known.platform, known.lockout, known.null, 0x4000_0006]) {
    await change(`value of ${hierarchy.toString(16)}`, hierarchy, secret)
    await change(`wrong value of ${hierarchy.toString(16)}`, hierarchy, empty, Uint8Array.of(1))
  }
  await properties(on, 'values set')
  await on.step('primary without the value', createPrimary(owner, storage))
  await on.step('primary with it', { ...createPrimary(owner, storage), auth: [password(secret)] })
  await on.step('flush', flush(0x8000_0000))
  await change('too long', owner, new Uint8Array(65).fill(1), secret)
  await change('64 bytes', owner, new Uint8Array(64).fill(1), secret)
  await change('back', owner, empty, new Uint8Array(64).fill(1))
  await change('lockout value while locked out', known.lockout, empty, secret)
  const session = await tpm.session('hmac', { bound: { handle: known.endorsement, auth: secret } })
  await on.step('bound session, new value', {
    code: command.hierarchyChangeAuth,
    handles: [known.endorsement],
    auth: [{ session }],
    parameters: sized(empty),
    unchecked: true,
  })
  await on.flush(session.handle)
  await on.subject.init()
  await startup(on, 'start', 0)
  await change('platform value is gone after a start', known.platform, empty)
  const word = Uint8Array.of(9, 9)
  const parent = await on.primary(owner, storage)
  const guarded = await on.child(parent, { ...sealed, attributes: sealed.attributes & ~bits.noDA }, { data: one, auth: word })
  const unseal = async (label: string, auth: Uint8Array): Promise<void> =>
    void (await on.step(label, { code: command.unseal, handles: [guarded.handle], auth: [password(auth)] }))
  await unseal('first use', word)
  await unseal('second use', word)
  for (let at = 0; at < 4; at++) await unseal(`wrong ${at}`, empty)
  await properties(on, 'locked out')
  await unseal('right while locked out', word)
  await on.step('free object while locked out', { ...createPrimary(known.endorsement, ecc(own | bits.noDA | bits.sign, { scheme: ecdsa })) })
  const lockout = async (label: string, code: number, parameters: Uint8Array, auth: Uint8Array = secret): Promise<void> =>
    void (await on.step(label, { code, handles: [known.lockout], auth: [password(auth)], parameters }))
  await lockout('reset', command.dictionaryAttackLockReset, empty)
  // The lockout value was tried wrong; by the platform there is a way on.
  await on.step('clear by the platform', { code: command.clear, handles: [known.platform], auth: [password()] })
  await properties(on, 'cleared')
  await on.step('what was loaded is gone', { code: command.readPublic, handles: [parent.handle] })
  await lockout('parameters', command.dictionaryAttackParameters, concat(u32(5), u32(100), u32(200)), empty)
  await lockout('reset with no value', command.dictionaryAttackLockReset, empty, empty)
  await lockout('parameters too short', command.dictionaryAttackParameters, concat(u32(5), u32(100)), empty)
  await properties(on, 'parameters')
  const control = async (label: string, by: number, disable: number): Promise<void> =>
    void (await on.step(label, { code: command.clearControl, handles: [by], auth: [password()], parameters: Uint8Array.of(disable) }))
  await control('no more clear', known.lockout, 1)
  await control('clear again, by the lockout hierarchy', known.lockout, 0)
  await on.step('clear while disabled', { code: command.clear, handles: [known.lockout], auth: [password()] })
  await control('neither', known.platform, 2)
  await control('clear again', known.platform, 0)
  await on.step('clear by the owner', { code: command.clear, handles: [owner], auth: [password()] })
  const policy = async (label: string, by: number, digest: Uint8Array, hash: number): Promise<void> =>
    void (await on.step(label, { code: command.setPrimaryPolicy, handles: [by], auth: [password()], parameters: concat(sized(digest), u16(hash)) }))
  await policy('policy', owner, one, alg.sha256)
  await policy('policy of a wrong size', owner, one, alg.sha384)
  await policy('no policy', owner, empty, alg.null)
  await clock(on, 'counters after a clear')
}

/** Contexts and persistent objects. */
export const contexts: Scenario = async (on) => {
  const key = await on.primary(owner, signing)
  const save = async (label: string, handle: number): Promise<Uint8Array> =>
    (
      await on.step(
        {
          label,
          length: false,
          see: (reader) => ({ sequence: reader.u64().toString(), handle: reader.u32().toString(16), hierarchy: reader.u32().toString(16) }),
        },
        { code: command.contextSave, handles: [handle] },
      )
    ).parameters
  const restore = async (label: string, context: Uint8Array): Promise<number> =>
    (await on.step(label, { code: command.contextLoad, parameters: context, givesHandle: true })).handle
  const context = await save('save', key.handle)
  on.note('loaded as', (await restore('load', context)).toString(16))
  on.note('loaded again as', (await restore('load again', context)).toString(16))
  await restore('no room', context)
  await on.flush(key.handle, 0x8000_0001, 0x8000_0002)
  const flip = (at: number): Uint8Array => context.map((byte, place) => (place === at ? byte ^ 1 : byte))
  await restore('another sequence', flip(7))
  await restore('another hierarchy', flip(15))
  await restore('altered', flip(100))
  await restore('of no handle', flip(8))
  await restore('short', context.subarray(0, 40))
  await restore('empty blob', concat(context.subarray(0, 16), sized(empty)))
  const session = await on.subject.tpm.session('policy')
  const saved = await save('save a session', session.handle)
  await on.step('it is gone', { code: command.policyGetDigest, handles: [session.handle] })
  on.note('session', ((await restore('load the session', saved)) & 0xff).toString(16))
  await restore('load the session again', saved)
  await on.flush(session.handle)
  await restore('load what was flushed', saved)
  await save('save what is not there', 0x8000_0002)
  await save('save a persistent object', 0x8100_0000)
  const object = await on.primary(owner, storage)
  const evict = async (label: string, by: number, handle: number, to: number): Promise<void> =>
    void (await on.step(label, { code: command.evictControl, handles: [by, handle], auth: [password()], parameters: u32(to) }))
  await evict('persist', owner, object.handle, 0x8100_0001)
  await evict('persist where something is', owner, object.handle, 0x8100_0001)
  await evict('persist at a platform handle', owner, object.handle, 0x8180_0000)
  await evict('persist by the platform', known.platform, object.handle, 0x8180_0000)
  await evict('persist at no handle', owner, object.handle, 0x8000_0001)
  await evict('persist by the lockout hierarchy', known.lockout, object.handle, 0x8100_0002)
  await on.step('read it', { code: command.readPublic, handles: [0x8100_0001] })
  await evict('move it', owner, 0x8100_0001, 0x8100_0002)
  await on.subject.init()
  await startup(on, 'start', 0)
  await on.step('it stays', { code: command.readPublic, handles: [0x8100_0001] })
  await restore('contexts do not', context)
  await on.step(
    { label: 'persistent handles', see: (reader) => reader.rest() },
    { code: command.getCapability, parameters: concat(u32(1), u32(0x8100_0000), u32(10)) },
  )
  await evict('remove it', owner, 0x8100_0001, 0x8100_0001)
  await evict('remove it again', owner, 0x8100_0001, 0x8100_0001)
  const temporary = await on.primary(known.null, storage)
  await evict('persist a temporary object', owner, temporary.handle, 0x8100_0003)
  const platforms = await on.primary(known.platform, storage)
  await evict('the platform’s by the owner', owner, platforms.handle, 0x8100_0003)
  await evict('the platform’s below', known.platform, platforms.handle, 0x8100_0003)
  await evict('the platform’s', known.platform, platforms.handle, 0x8180_0003)
}
