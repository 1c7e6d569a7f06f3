import assert from 'node:assert/strict'
import { verifyExport } from '@fleetkey/cli/offline/audit.ts'
import { decode } from '@fleetkey/protocol/cbor.ts'
import { ApprovalSet } from '@fleetkey/protocol/messages.ts'
import { validateChain } from '@fleetkey/protocol/x509/path.ts'
import { hasIdentity, isMeasured } from '@fleetkey/server/fleet/device.ts'
import type { Rollover } from '@fleetkey/server/ca/rollover.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { rows, type DeviceEvidence, type Evidence } from './evidence.ts'

/** I1: no acknowledged key is lost. What a device has acknowledged and not retired, it holds. */
export const acknowledgedKeysAreHeld = async ({ store, devices }: Evidence): Promise<void> => {
  for (const { device, status } of devices)
    for (const { key, epoch, stage } of await store.find('holding', { where: { device }, limit: 500 }))
      if (stage === 'installed' || stage === 'active')
        assert.ok(
          status.holdings.some((held) => held.key === key && held.epoch === epoch),
          `I1: ${device} acknowledged ${key}/${epoch} as ${stage} and does not hold it`,
        )
}

/** I2: server and device always share a usable epoch. */
export const anEpochIsShared = async ({ store, devices }: Evidence): Promise<void> => {
  for (const key of await rows(store, 'key'))
    for (const { device, status } of devices) {
      const holdings = (await store.find('holding', { where: { device }, limit: 500 })).filter(({ key: of, stage }) => of === key.id && stage !== 'retired')
      if (holdings.length === 0) continue
      const current = status.current[key.id]
      const epoch = current === undefined ? undefined : await store.get('epoch', `${key.id}/${current}`)
      assert.ok(
        // A compromised epoch is in use until its successor is, or for good when somebody takes that rotation back.
        epoch?.state === 'active' || epoch?.state === 'deactivated' || (epoch?.state === 'compromised' && epoch.epoch === key.current),
        `I2: ${device} uses ${key.id}/${String(current)}, which is ${epoch?.state ?? 'unknown'} at the server`,
      )
    }
}

/** I3: a device's epoch never falls. */
export const epochsNeverFall = ({ history }: Evidence): void => {
  const highest = new Map<string, number>()
  for (const { device, key, epoch } of history) {
    const before = highest.get(`${device} ${key}`) ?? 0
    assert.ok(epoch >= before, `I3: ${device} fell from ${key}/${before} to ${epoch}`)
    highest.set(`${device} ${key}`, epoch)
  }
}

/** I4: one value per (device, key, epoch): whoever uses the same epoch of a group key has the same key. */
export const oneValuePerEpoch = async ({ store, devices }: Evidence): Promise<void> => await sameValues(await rows(store, 'key'), devices)

/** I4 while the server runs. */
export const sameValues = async (
  keys: readonly { readonly id: string; readonly protection: 'sealed' | 'tpm' }[],
  devices: readonly DeviceEvidence[],
): Promise<void> => {
  for (const { id, protection } of keys)
    for (const one of devices)
      for (const other of devices) {
        const epoch = one.status.current[id]
        if (epoch === undefined || other.status.current[id] !== epoch) continue
        if (protection === 'sealed') assert.equal(await other.decrypt(id, await one.encrypt(id, 'the same')), 'the same', `I4: ${id}/${epoch}`)
        else {
          const { mac } = await one.mac(id, 'the same')
          assert.ok(await other.verify(id, epoch, 'the same', mac), `I4: ${id}/${epoch} of ${one.device} and ${other.device}`)
        }
      }
}

/** I5: no two devices hold one LDevID key, no serial number twice. */
export const identitiesAreUnique = async ({ store }: Evidence): Promise<void> => {
  const keys = new Map<string, string>()
  for (const device of await rows(store, 'device')) {
    const last = device.state === 'suspended' ? device.before : device
    if (last.state === 'registered' || last.keys === null) continue
    const key = Buffer.from(last.keys.ldevidSpki).toString('hex')
    assert.equal(keys.get(key), undefined, `I5: ${device.id} and ${String(keys.get(key))} have one LDevID key`)
    keys.set(key, device.id)
  }
  const serials = new Set<string>()
  for (const { der } of await rows(store, 'certificate')) {
    const { serial } = parseCertificate(der)
    assert.ok(!serials.has(serial), `I5: serial ${serial} twice`)
    serials.add(serial)
  }
}

/** I6: every signed certificate has an intent that was written before. */
export const certificatesWereIntended = async ({ store }: Evidence): Promise<void> => {
  for (const { id, profile } of await rows(store, 'certificate')) {
    // Server TLS certificates and roles are intended as well; only the root signs itself.
    const intent = await store.get('intent', id)
    assert.ok(intent !== undefined || profile === 'root-ca', `I6: certificate ${id} (${profile}) without intent`)
  }
  for (const { id, state, profile } of await rows(store, 'intent')) assert.notEqual(state, 'open', `I6: intent ${id} (${profile}) is still open`)
}

/** I7: a challenge is spent once, and so is an enrolment token. */
export const challengesAreSpentOnce = ({ log, devices }: Evidence): void => {
  const spent = [...log.matchAll(/challenge ([0-9a-f]{32}) spent/g)].map(([, id]) => id)
  assert.equal(new Set(spent).size, spent.length, 'I7: a challenge was spent twice')
  assert.ok(spent.length >= devices.length, 'I7: a device was enrolled without a challenge')
  const tokens = [...log.matchAll(/token ([0-9a-f]{32}) spent/g)].map(([, id]) => id)
  assert.equal(new Set(tokens).size, tokens.length, 'I7: an enrolment token was spent twice')
}

/** I9: the audit log verifies, and says each effect once. */
export const auditIsWhole = async ({ log, auditKey, store }: Evidence): Promise<void> => {
  const verdict = verifyExport(log, auditKey, [])
  assert.ok(verdict.ok, `I9: ${JSON.stringify(verdict)}`)
  const entries = log.matchAll(
    /"action":"device.acknowledge"[^\n]*?"subject":"([a-z0-9-]+)"[^\n]*?"outcome":"done"[^\n]*?"detail":"([a-z-]+)\/(\d+) (?:(installed|active)|retired; erased ([0-9, ]+))"/g,
  )
  const said = new Set<string>()
  const ever = new Set<string>()
  for (const [, device, key, epoch, stage, erased] of entries) {
    // What was erased, and delivered anew since, is an effect of its own.
    for (const old of erased?.split(', ') ?? []) for (const was of ['installed', 'active']) said.delete(`${device} ${key}/${old} ${was}`)
    if (stage === undefined) continue
    const effect = `${device} ${key}/${epoch} ${stage}`
    assert.ok(!said.has(effect), `I9: an effect twice: ${effect}`)
    said.add(effect)
    ever.add(effect)
  }
  for (const { device, key, epoch, activeAt } of await rows(store, 'holding'))
    if (activeAt !== null) assert.ok(ever.has(`${device} ${key}/${epoch} active`), `I9: ${device} ${key}/${epoch} is active and the log does not say so`)
}

/** I12: whatever a broker does, no device holds what the server did not send, and none of it is another's. */
export const onlyWhatWasSent = async ({ store, devices }: Evidence): Promise<void> => {
  for (const { device, status } of devices)
    for (const { key, epoch } of status.holdings)
      assert.ok((await store.get('holding', `${device}/${key}/${epoch}`)) !== undefined, `I12: ${device} holds ${key}/${epoch}, which was never sent to it`)
}

/** I15: the stages of a campaign add up to its targets. */
export const stagesAddUp = async ({ store }: Evidence): Promise<void> => {
  const targets = await rows(store, 'target')
  for (const { id, waves } of await rows(store, 'campaign')) {
    const own = targets.filter(({ campaign }) => campaign === id)
    assert.ok(
      own.every(({ wave, stage, place }) => wave < waves && place === `${id}/${wave}/${stage}`),
      `I15: a target of ${id} is misplaced`,
    )
    assert.equal(new Set(own.map(({ device }) => device)).size, own.length, `I15: a device is twice in ${id}`)
  }
}

/**
 * I19: the next CA is trusted everywhere before it signs. Every certificate for somebody else was intended after the trust bundle that told of its CA; and from
 * each root that the fleet trusted then a chain of certificates that existed leads to it, so that whoever was away finds it.
 */
export const theNextCaWasKnown = async ({ store }: Pick<Evidence, 'store'>): Promise<void> => {
  const setting = await store.get('setting', 'ca/rollover')
  if (setting === undefined) return
  const { generations, history } = decode(setting.value) as Rollover
  const settings = (await rows(store, 'setting')).filter(({ id }) => id.startsWith('ca/'))
  const certificateAt = (id: string) => settings.filter((one) => one.id === id).map(({ value }) => parseCertificate(value))[0]
  const numbered = (name: string, number: number): string => (number === 1 ? name : `${name}/${number}`)
  const crosses = settings.filter(({ id }) => id.startsWith('ca/cross/')).map(({ value }) => parseCertificate(value))
  for (const { profile, issuer, id } of await rows(store, 'certificate')) {
    if (issuer === undefined || !issuer.startsWith('issuing-ca')) continue
    const number = Number(issuer.slice('issuing-ca-'.length) || '1')
    const intent = await store.get('intent', id)
    const generation = generations.find((one) => one.number === number)
    assert.ok(intent !== undefined && generation !== undefined, `I19: certificate ${id} of ${issuer}, which there is not`)
    if (number === 1) continue
    const issuing = certificateAt(numbered('ca/issuing', number))
    assert.ok(issuing !== undefined, `I19: no certificate of generation ${number}`)
    // Told of first in the version after the one before which its own certificate was made.
    const told = history.find(({ at, version }) => version > 1 && at >= issuing.notBefore + 3_600_000)
    assert.ok(told !== undefined && told.at <= intent.createdAt, `I19: ${profile} ${id} was signed by generation ${number} before anybody was told of it`)
    const before = history.findLast(({ version }) => version < told.version)
    for (const root of before?.roots ?? []) {
      const trusted = certificateAt(numbered('ca/root', root))
      const way: boolean =
        trusted !== undefined &&
        validateChain({ leaf: issuing, intermediates: crosses, roots: [trusted], at: intent.createdAt, leafMayBeCa: true, maxIntermediates: 16 }).ok
      assert.ok(way, `I19: nothing leads from root ${root} to generation ${number}, which signed ${profile} ${id}`)
    }
  }
}

/** What was done of these actions, in order, by the log. */
const done = function* (log: string, actions: ReadonlySet<string>): Generator<{ readonly action: string; readonly subject: string; readonly detail: string }> {
  for (const [, line = ''] of log.matchAll(/^(\{.*"outcome":"done".*\})$/gm)) {
    const read = JSON.parse(line) as { entry?: object }
    const entry = (read.entry ?? read) as { action: string; subject: string; detail: string }
    if (actions.has(entry.action)) yield entry
  }
}

/** I23: a quarantined device receives no key: nothing waits for it, and the log shows no delivery between its quarantine and the evidence that ended it. */
export const quarantinedGetNothing = async ({ store, log }: Evidence): Promise<void> => {
  for (const { id } of await store.find('device', { where: { state: 'quarantined' }, limit: 500 }))
    for (const { subject } of await store.find('outbox', { where: { device: id }, limit: 500 }))
      assert.ok(subject.startsWith('retire/'), `I23: ${subject} waits for quarantined ${id}`)
  const quarantined = new Set<string>()
  for (const { action, subject, detail } of done(log, new Set(['device.evidence', 'device.quarantine', 'enrol.issue', 'key.deliver']))) {
    assert.ok(action !== 'key.deliver' || !quarantined.has(subject), `I23: a delivery to quarantined ${subject}`)
    if (/(^|; )(stays )?quarantined: /.test(detail)) quarantined.add(subject)
    else if (action !== 'key.deliver') quarantined.delete(subject)
  }
}

/** I24: a device out of service receives nothing: nothing waits for it, no certificate of it is good, and the log shows no delivery until it is reinstated. */
export const barredGetNothing = async ({ store, log }: Evidence): Promise<void> => {
  for (const device of await rows(store, 'device')) {
    if (device.state !== 'suspended' && device.state !== 'revoked') continue
    const since = device.state === 'suspended' ? device.suspendedAt : device.revokedAt
    const waiting = await store.find('outbox', { where: { device: device.id }, limit: 1 })
    assert.equal(waiting.length, 0, `I24: ${String(waiting[0]?.subject)} waits for ${device.state} ${device.id}`)
    for (const { id, status, notAfter } of await store.find('certificate', { where: { device: device.id }, limit: 500 }))
      assert.ok(status !== 'valid' || notAfter < since, `I24: certificate ${id} of ${device.state} ${device.id} is good`)
  }
  const barred = new Set<string>()
  for (const { action, subject } of done(log, new Set(['device.suspend', 'device.revoke', 'device.reinstate', 'key.deliver']))) {
    assert.ok(action !== 'key.deliver' || !barred.has(subject), `I24: a delivery to ${subject}, which is out of service`)
    if (action === 'device.suspend' || action === 'device.revoke') barred.add(subject)
    else if (action === 'device.reinstate') barred.delete(subject)
  }
}

/** I25: under withdrawn firmware nothing opens that is in use, whatever was kept of the medium; and no withdrawn release is approved for keys of now. */
export const withdrawnFirmwareOpensNothing = async ({ store, opened = [] }: Evidence): Promise<void> => {
  const keys = new Map((await rows(store, 'key')).map(({ id, current }) => [id as string, current]))
  for (const { device, by, how, holdings } of opened)
    for (const { key, epoch } of by === 'withdrawn' ? holdings : [])
      assert.ok(epoch < (keys.get(key) ?? 0), `I25: ${device} opens ${key}/${epoch}, which is in use, with ${how}`)
  const settings = await rows(store, 'setting')
  for (const { id: of, model, withdrawn } of await rows(store, 'release')) {
    if (withdrawn === null) continue
    const generation = settings.find(({ id }) => id === `firmware/${model}`)
    assert.ok(generation !== undefined, `I25: ${of} was withdrawn, and the keys of ${model} stayed under the approvals that it has`)
    const approvals = settings.find(({ id }) => id === `approvals/${model}/${Number(decode(generation.value))}`)
    const approved = approvals === undefined ? [] : ApprovalSet.shape.approvals.parse(decode(approvals.value))
    assert.ok(
      approved.every(({ release }) => release !== of),
      `I25: ${of} was withdrawn and is approved`,
    )
  }
}

/** I26: a key that is bound to the TPM is in no device without one, and what a device has stored opens beside no other TPM. */
export const boundKeysStayInTheirTpm = async ({ store, devices, opened = [] }: Evidence): Promise<void> => {
  const bound = new Set<string>((await rows(store, 'key')).flatMap(({ id, protection }) => (protection === 'tpm' ? [id] : [])))
  for (const { device, key } of bound.size === 0 ? [] : await rows(store, 'holding')) {
    const row = bound.has(key) ? await store.get('device', device) : undefined
    assert.ok(!hasIdentity(row) || isMeasured(row), `I26: ${key} was sent to ${device}, which has no TPM`)
  }
  for (const { device, status, encrypt } of devices)
    for (const { key } of status.holdings.filter((one) => bound.has(one.key))) {
      const isRefused = await encrypt(key, 'out').then(
        () => false,
        () => true,
      )
      assert.ok(isRefused, `I26: ${device} has the bytes of ${key}`)
    }
  for (const { device, by, how, holdings } of opened) assert.ok(by !== 'another TPM' || holdings.length === 0, `I26: what ${device} has stored opens ${how}`)
}

/** I27: what an act has to have done besides is done: no rotation and no verdict stays owed. */
export const nothingStaysOwed = async ({ store }: Evidence): Promise<void> => {
  const owed = (await rows(store, 'setting')).filter(({ id }) => id.startsWith('owed-')).map(({ id }) => id)
  assert.deepEqual(owed, [], 'I27: owed and not done')
}

/** Those that hold after every fault run. */
export const invariants: readonly ((evidence: Evidence) => Promise<void> | void)[] = [
  acknowledgedKeysAreHeld,
  anEpochIsShared,
  epochsNeverFall,
  oneValuePerEpoch,
  identitiesAreUnique,
  certificatesWereIntended,
  challengesAreSpentOnce,
  auditIsWhole,
  onlyWhatWasSent,
  stagesAddUp,
  theNextCaWasKnown,
  quarantinedGetNothing,
  barredGetNothing,
  withdrawnFirmwareOpensNothing,
  boundKeysStayInTheirTpm,
  nothingStaysOwed,
]
